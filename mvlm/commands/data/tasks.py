"""The commands `mvlm data ...` that build shards from the published data sets of downstream tasks."""

from pathlib import Path

from mvlm.commands.data_build import CommonOptions, build_source
from mvlm_dataloading.options import BuildOptions

# Commands import what they need when they run, so that --help and errors are immediate.


def vqa_v2(
    root: Path,
    out: Path,
    /,
    images: Path | None = None,
    held_out: int = 0,
    minival: Path | None = None,
    build: BuildOptions = BuildOptions(),  # noqa: B008 (frozen)
    common: CommonOptions = CommonOptions(),  # noqa: B008
) -> None:
    """Build shards from VQA v2, for the task vqa: train2014, val2014 and, without answers, test2015.

    Args:
        root: Unpacked download with v2_OpenEnded_mscoco_*_questions.json and v2_mscoco_*_annotations.json.
        out: Folder for the shards. To resume a killed build, give the same command again.
        images: Parent of COCO's train2014, val2014 and test2015. Default: ROOT.
        held_out: Validate on the questions of this many images of val2014, and train on the others too.
        minival: Validate on the questions that this file chooses from val2014, and train on the others too: a list of
            questions or of their ids, or Karpathy's dataset_coco.json.
    """
    from mvlm_dataloading.sources.tasks.vqa_v2 import vqa_v2

    build_source(vqa_v2(root, images, held_out, minival), out, build, common)


def visual_genome_qa(
    root: Path,
    out: Path,
    /,
    validation: float = 0.0,
    test: float = 0.0,
    build: BuildOptions = BuildOptions(),  # noqa: B008
    common: CommonOptions = CommonOptions(),  # noqa: B008
) -> None:
    """Build shards from Visual Genome's questions, for the task vqa.

    Args:
        root: Unpacked download with question_answers.json, VG_100K and VG_100K_2.
        out: Folder for the shards. To resume a killed build, give the same command again.
        validation: Share of the images for validation, chosen by a hash of the id.
        test: Share of the images for test, chosen by a hash of the id.
    """
    from mvlm_dataloading.sources.tasks.visual_genome_qa import visual_genome_qa

    build_source(visual_genome_qa(root, validation, test), out, build, common)


def nlvr2(
    root: Path,
    out: Path,
    /,
    images: Path | None = None,
    side: int = 384,
    build: BuildOptions = BuildOptions(),  # noqa: B008
    common: CommonOptions = CommonOptions(),  # noqa: B008
) -> None:
    """Build shards from NLVR2, for the task pairs: two photographs side by side, and a sentence about them.

    Args:
        root: Folder with train.json, dev.json and test1.json.
        out: Folder for the shards. To resume a killed build, give the same command again.
        images: Folder with train, dev and test1. Default: ROOT/images, or ROOT.
        side: Side in pixels to which each image is resized.
    """
    from mvlm_dataloading.sources.tasks.nlvr import nlvr2

    build_source(nlvr2(root, images, side), out, build, common)


def nlvr(
    root: Path,
    out: Path,
    /,
    side: int = 100,
    permutations: int = 6,
    build: BuildOptions = BuildOptions(),  # noqa: B008
    common: CommonOptions = CommonOptions(),  # noqa: B008
) -> None:
    """Build shards from NLVR (2017), for the task pairs: three boxes with shapes, and a sentence about them.

    Args:
        root: Unpacked download with train, dev and test.
        out: Folder for the shards. To resume a killed build, give the same command again.
        side: Side in pixels to which each box is resized. As published: 100.
        permutations: Orders of the boxes, of six, that a training sentence is shown with.
    """
    from mvlm_dataloading.sources.tasks.nlvr import nlvr

    build_source(nlvr(root, side, permutations), out, build, common)


def snli_ve(
    root: Path,
    out: Path,
    /,
    images: Path | None = None,
    build: BuildOptions = BuildOptions(),  # noqa: B008
    common: CommonOptions = CommonOptions(),  # noqa: B008
) -> None:
    """Build shards from SNLI-VE, for the task entailment: an image of Flickr30k and a hypothesis about it.

    Args:
        root: Folder with snli_ve_train.jsonl, snli_ve_dev.jsonl and snli_ve_test.jsonl.
        out: Folder for the shards. To resume a killed build, give the same command again.
        images: Folder of Flickr30k's images. Default: ROOT/flickr30k-images.
    """
    from mvlm_dataloading.sources.tasks.snli_ve import snli_ve

    build_source(snli_ve(root, images), out, build, common)
