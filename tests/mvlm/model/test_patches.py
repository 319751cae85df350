import torch

from mvlm.model.patches import masked_patches, visible_patches


def test_masked_patches_against_a_loop():
    ids = torch.tensor([[0, 3, 5], [1, 2, 8], [6, 7, 8]])
    mask = masked_patches(ids, 9)
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 9)
    for row in range(3):
        for patch in range(9):
            assert bool(mask[row, patch]) == (patch in ids[row].tolist())


def test_visible_patches_are_the_others():
    patch_ids = torch.tensor([[0, 3, 4], [1, 2, 8]])
    assert visible_patches(patch_ids, 9).tolist() == [[1, 2, 5, 6, 7, 8], [0, 3, 4, 5, 6, 7]]
