"""Pretraining on your own folder of pictures: shards, a run, and the trained model's answers.

    python examples/pretrain_a_folder.py PICTURES OUT --steps 200

The captions of PICTURES/a/b.jpg are the lines of PICTURES/a/b.txt. If you have no pictures at hand, the demo's will do:

    mkdir pictures && tar xf data/emoji/test-000000.tar -C pictures

Prints how many pictures there are to train on, and how well two captions suit the first of them. OUT/data holds the
shards and OUT/run the run, which the same command continues after a kill. Other pictures need another OUT.
"""

import argparse
from pathlib import Path

import mvlm
from mvlm_dataloading import build_shards, from_folder, open_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", default="tiny", help="tiny, small or base")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="processes that write shards; one per core by default")
    arguments = parser.parse_args()
    data, run = arguments.out / "data", arguments.out / "run"

    # The split of a picture is chosen by a hash of its name, so it is the same in another OUT with more pictures.
    build_shards(from_folder(arguments.pictures, validation=0.1), data, workers=arguments.workers)
    dataset = open_dataset(data, "train")
    print(f"{len(dataset)} pictures to train on; {data / 'rejected.jsonl'} lists what cannot be used")

    # The recipe of the preset, with what is changed here. `mvlm pretrain tiny --help` lists every setting.
    config = mvlm.PretrainConfig.preset(
        arguments.preset,
        data=data,
        out=run,
        max_steps=arguments.steps,
        batch_size=arguments.batch_size,
        warmup_steps=arguments.steps // 10,
        resume=True,
    )
    mvlm.pretrain(config)

    # How well does the first picture suit its own caption, and that of the last picture?
    model = mvlm.load_model(run)
    picture = dataset.image_bytes(0)
    captions = [dataset.captions(0)[0], dataset.captions(len(dataset) - 1)[0]]
    probabilities = model.match(picture, captions).probability.tolist()
    for caption, probability in zip(captions, probabilities, strict=True):
        print(f"{probability:.3f} {caption}")


# The processes that write shards import this file, and must not start over.
if __name__ == "__main__":
    main()
