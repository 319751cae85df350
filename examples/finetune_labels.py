"""Fine-tuning on your own labels: each becomes the answer to one question about its picture.

    python examples/finetune_labels.py --checkpoint runs/demo --data data/emoji --label group --out labels --steps 200

A label is a field of a sample's metadata. Prints the accuracy on the validation split with its 95 % interval, and that
of the most frequent label. OUT, a new folder, gets the questions as OUT/data and the fine-tuned run as OUT/run.
examples/counting_task.py predicts numbers instead, by a head of its own.
"""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mvlm.tasks.evaluate import evaluate_task
from mvlm.tasks.finetune import finetune
from mvlm.tasks.recipes import finetune_defaults
from mvlm_dataloading import ShardWriter, open_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--checkpoint", type=Path, default="runs/demo")
parser.add_argument("--data", type=Path, default="data/emoji")
parser.add_argument("--label", default="group")
parser.add_argument("--out", type=Path, default="labels")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch-size", type=int, default=64)
arguments = parser.parse_args()
data, run = arguments.out / "data", arguments.out / "run"

train = open_dataset(arguments.data, "train")
fields = train.metadata(0)
if arguments.label not in fields:
    raise SystemExit(f"--label: wanted one of {', '.join(fields)}, got {arguments.label}")
if data.exists():
    raise SystemExit(f"--out: wanted a new folder, found {data}; choose another, or remove it")

# Pictures keep their licence.
terms = {name: train.description.get(name, "") for name in ("licence", "attribution")}
header = {"name": "labels", "source": str(arguments.data), **terms, "recipe": {}}
frequencies: Counter[str] = Counter()
with ShardWriter(data, **header) as writer:
    for split in ("train", "validation"):
        pictures = open_dataset(arguments.data, split)
        for i in range(len(pictures)):
            key = str(pictures.keys[i])
            label = str(pictures.metadata(i)[arguments.label])
            # The metric compares an answer with those of other people, so ten people give the label.
            answers = [{"answer": label, "answer_id": person} for person in range(10)]
            metadata = {"question_id": key, "answers": answers}
            # A sample's question is its caption.
            writer.add(key, pictures.image_bytes(i), ["what is it?"], metadata, split=split)
            if split == "validation":
                frequencies[label] += 1

# The classifier chooses among the labels of the training split. It is new; the rest starts from the pretrained model.
config = replace(
    finetune_defaults("vqa", arguments.checkpoint, data, run),
    answers="classifier",
    max_steps=arguments.steps,
    batch_size=arguments.batch_size,
    warmup_steps=arguments.steps // 10,
)
finetune(config)

figures, records = evaluate_task(run, data, "validation")
low, high = figures["accuracy_95"]
print(f"accuracy {figures['accuracy']:.1f} % ({low:.1f} to {high:.1f})")
label, number = frequencies.most_common(1)[0]
print(f"always {label!r}: {100 * number / frequencies.total():.1f} %")
