"""Sizes of data sets as their authors and the papers that use them state them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a split. None for a number that nobody states."""

    rows: int | None
    """Samples: images of a caption set, questions or expressions of a task."""
    images: int | None = None
    """Different image files."""
    texts: int | None = None
    """Captions, where a sample has several."""


SIZES: dict[str, dict[str, Size]] = {
    # Karpathy and Fei-Fei, CVPR 2015; train with restval. The captions add up to COCO's 616,767.
    "coco, Karpathy's splits": {
        "train": Size(113_287, 113_287, 566_747),
        "validation": Size(5_000, 5_000, 25_010),
        "test": Size(5_000, 5_000, 25_010),
    },
    # https://cocodataset.org
    "coco, 2014": {"train": Size(82_783, 82_783, 414_113), "validation": Size(40_504, 40_504, 202_654)},
    "coco, 2017": {"train": Size(118_287, 118_287, 591_753), "validation": Size(5_000, 5_000, 25_014)},
    # Karpathy and Fei-Fei, CVPR 2015: 29,000, 1,014 and 1,000 images with five captions each.
    "flickr30k, Karpathy's splits": {
        "train": Size(29_000, 29_000, 145_000),
        "validation": Size(1_014, 1_014, 5_070),
        "test": Size(1_000, 1_000, 5_000),
    },
    # Young et al., TACL 2014: all images, without splits.
    "flickr30k, all images": {"train": Size(31_783, 31_783, 158_915)},
    # https://visualqa.org/download.html; the images are those of COCO.
    "vqa-v2": {
        "train": Size(443_757, 82_783),
        "validation": Size(214_354, 40_504),
        "test": Size(447_793, 81_434),
    },
    # https://homes.cs.washington.edu/~ranjay/visualgenome, version 1.2
    "visual-genome-qa": {"train": Size(1_445_322)},
    # Suhr et al., ACL 2019, table 1; images counted in https://github.com/lil-lab/nlvr, two for each pair.
    "nlvr2": {
        "train": Size(86_373),
        "validation": Size(6_982, 8_102),
        "test": Size(6_967, 8_082),
        "test2": Size(6_970, 8_148),
    },
    # Suhr et al., ACL 2017: 12,410 training rows in six orders of the boxes; 989, 990 and 985 for evaluation.
    "nlvr": {
        "train": Size(74_460, 74_460),
        "validation": Size(989, 989),
        "test": Size(990, 990),
        "hidden": Size(985, 985),
    },
    # https://github.com/necla-ml/SNLI-VE: the sums of its table over the three labels.
    "snli-ve": {
        "train": Size(529_527, 29_783),
        "validation": Size(17_858, 1_000),
        "test": Size(17_901, 1_000),
    },
    # Yu et al., ECCV 2016. The splits add up to 141,564 expressions and 19,992 images.
    "refcoco+": {
        "train": Size(120_191, 16_992),
        "validation": Size(10_758, 1_500),
        "testA": Size(5_726, 750),
        "testB": Size(4_889, 750),
    },
}
OPTIONAL = {"nlvr2": ("test2",), "nlvr": ("hidden",)}
"""Splits that a complete data set may lack."""
