"""Small data sets in the published formats, made with Pillow."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def make_image(i: int, size: tuple[int, int] = (72, 54)) -> Image.Image:
    """Image number i, of (width, height) `size`: soft colours, unlike those of any other number."""
    small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind != "PNG" else {}), **options)
    return file.getvalue()


def with_exif(image: Image.Image, kind: str, orientation: int, **options: Any) -> bytes:
    """An image as a file whose EXIF data say how it is turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif.tobytes(), **options)


def captions(i: int) -> list[str]:
    return [f"soft colours, number {i}", f"the {i}th of some pictures"][: 1 + i % 2]


def write_image(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(make_image(i)))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def hub_rows(count: int) -> list[dict[str, Any]]:
    """Rows of a table as the Hugging Face hub has them."""
    return [
        {"image": {"bytes": encoded(make_image(i)), "path": f"{i}.jpg"}, "caption": captions(i), "id": f"row {i}"}
        for i in range(count)
    ]


def coco(root: Path, train: int = 8, val: int = 4, year: int = 2014) -> None:
    """train2014, val2014, their annotations, and Karpathy's splits: of val, one is restval, one val, the rest test."""
    karpathy = []
    for folder, numbers in ((f"train{year}", range(train)), (f"val{year}", range(train, train + val))):
        images, annotations = [], []
        for i in numbers:
            number = 100 + i
            name = f"COCO_{folder}_{number:012d}.jpg" if year == 2014 else f"{number:012d}.jpg"
            write_image(root / folder / name, i)
            images.append({"id": number, "file_name": name, "license": 1 + i % 2, "width": 72, "height": 54})
            annotations += [{"image_id": number, "id": 10 * i + k, "caption": c} for k, c in enumerate(captions(i))]
            split = "train" if i < train else ("restval", "val")[i - train] if i - train < 2 else "test"
            sentences = [{"raw": caption, "imgid": i, "tokens": caption.split()} for caption in captions(i)]
            old = f"{folder[:-4]}2014"
            karpathy.append(
                {
                    "filepath": old,
                    "filename": f"COCO_{old}_{number:012d}.jpg",
                    "cocoid": number,
                    "imgid": i,
                    "split": split,
                    "sentences": sentences,
                }
            )
        licences = [{"id": 1, "url": "https://example.org/by/2.0/"}, {"id": 2, "url": "https://example.org/by-nc/2.0/"}]
        write_json(
            root / "annotations" / f"captions_{folder}.json",
            {"info": {}, "licenses": licences, "images": images, "annotations": annotations},
        )
    write_json(root / "dataset_coco.json", {"dataset": "coco", "images": karpathy})


FLICKR_SPLITS = ("train", "train", "train", "train", "val", "test")


def flickr30k(root: Path) -> None:
    """Six images, and their captions in all four formats. A row of results.csv lacks a bar, as the real one does."""
    images, lines, bars, rows = [], [], ["image_name| comment_number| comment"], []
    for i, split in enumerate(FLICKR_SPLITS):
        name = f"{1000 + i}.jpg"
        write_image(root / "flickr30k-images" / name, i)
        sentences = [{"raw": caption, "imgid": i} for caption in captions(i)]
        images.append({"filename": name, "split": split, "imgid": i, "sentids": [i], "sentences": sentences})
        for k, caption in enumerate(captions(i)):
            lines.append(f"{name}#{k}\t{caption}")
            bars.append(f"{name}| {k}   {caption}" if (i, k) == (3, 1) else f"{name}| {k}| {caption}")
        rows.append([json.dumps(captions(i)), "[0]", split, name, str(i)])
    write_json(root / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})
    (root / "results_20130124.token").write_text("\n".join(lines) + "\n")
    (root / "results.csv").write_text("\n".join(bars) + "\n")
    with (root / "flickr_annotations_30k.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["raw", "sentids", "split", "filename", "img_id"], *rows])


def visual_genome(root: Path, count: int = 6) -> None:
    descriptions, data = [], []
    for i in range(count):
        number = 2407000 + i
        write_image(root / ("VG_100K" if i % 2 else "VG_100K_2") / f"{number}.jpg", i)
        phrases = [f"part {k} of picture {i}" for k in range(4)] + ["part 0 of picture " + str(i)]
        regions = [{"region_id": k, "image_id": number, "phrase": phrase, "x": 1, "y": 2, "width": 9, "height": 9}
                   for k, phrase in enumerate(phrases)]  # fmt: skip
        descriptions.append({"id": number, "regions": regions})
        data.append({"image_id": number, "coco_id": 100 + i if i % 2 else None, "flickr_id": 7, "width": 72})
    write_json(root / "region_descriptions.json", descriptions)
    write_json(root / "image_data.json", data)


def img2dataset(root: Path, first: int = 0, tars: int = 2, each: int = 5) -> None:
    """Tars of five links each, with parquet table and statistics. The last download of each tar has failed."""
    import pyarrow
    from pyarrow import parquet

    root.mkdir(parents=True)
    for shard in range(tars):
        rows = []
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for k in range(each):
                i, key = first + each * shard + k, f"{shard:05d}{k:04d}"
                good = k < each - 1
                row = {
                    "url": f"https://example.org/{i}.jpg",
                    "key": key,
                    "status": "success" if good else "failed_to_download",
                    "error_message": None if good else "HTTP Error 404: Not Found",
                    "caption": captions(i)[0],
                    "width": 72 if good else None,
                    "height": 54 if good else None,
                    "sha256": "0" * 64 if good else None,
                }
                rows.append(row)
                if good:
                    add_members(
                        tar,
                        [
                            (f"{key}.jpg", encoded(make_image(i))),
                            (f"{key}.txt", captions(i)[0].encode()),
                            (f"{key}.json", json.dumps(row).encode()),
                        ],
                    )
        parquet.write_table(pyarrow.Table.from_pylist(rows), root / f"{shard:05d}.parquet")
        write_json(root / f"{shard:05d}_stats.json", {"count": each, "successes": each - 1})


def add_members(tar: tarfile.TarFile, members: list[tuple[str, bytes]]) -> None:
    for name, content in members:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def folder(root: Path, count: int = 6, *, sidecars: bool = True) -> None:
    """Images in two folders, with captions in text files and in captions.csv and .jsonl, and questions.csv."""
    names = [f"{'ab'[i % 2]}/{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        write_image(root / name, i)
        if sidecars:
            (root / name).with_suffix(".txt").write_text("\n".join(captions(i)) + "\n")
    with (root / "captions.csv").open("w", newline="") as file:
        rows = [[name, caption] for i, name in enumerate(names) for caption in captions(i)]
        csv.writer(file).writerows([["image", "caption"], *rows])
    with (root / "questions.csv").open("w", newline="") as file:
        rows = [
            [name, asked, f"{asked[:4]} {i}"] for i, name in enumerate(names) for asked in ("what is it?", "whose?")
        ]
        csv.writer(file).writerows([["image", "question", "answer"], *rows])
    with (root / "captions.jsonl").open("w") as file:
        for i, name in enumerate(names):
            split = ("train", "val", "test")[i % 3]
            file.write(json.dumps({"image": name, "caption": captions(i), "split": split}) + "\n")
