"""torchrun starts a run again after a kill, and it ends as if nothing had been. Each takes about 20 s."""


def test_torchrun_starts_again_after_a_worker_is_killed(trial):
    trial("worker killed")


def test_a_node_that_is_killed_is_replaced(trial):
    trial("node killed")
