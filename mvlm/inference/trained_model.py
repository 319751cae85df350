"""A trained model with its tokenizer, and the questions that it answers.

Shape legend: n images or pairs, m texts or labels, E contrastive width, S image side.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.inference import pairs, zero_shot
from mvlm.inference.arguments import one_text, whole_number
from mvlm.inference.attention_maps import AttentionMaps, attention_maps
from mvlm.inference.encode import BATCH, eval_loader, image_features, text_features
from mvlm.inference.fill_mask import fill_text
from mvlm.inference.images import ImageLike, Images, each_image, load_batches, load_image
from mvlm.inference.reconstruction import reconstruct_image
from mvlm.inference.results import Classification, FilledText, Matches, Ranking, Reconstruction
from mvlm.inference.texts import Texts, each_text, text_batches
from mvlm.model.maskvlm import MaskVLM
from mvlm.progress import WorkProgress
from mvlm_dataloading import Dataset, Tokenizer

PRECISIONS = ("auto", "bf16", "fp32")


class NetworkAndTokenizer(NamedTuple):
    """A network and the tokenizer of its captions."""

    network: MaskVLM
    """The network, in evaluation mode."""
    tokenizer: Tokenizer


def hash_of(config: MaskVLMConfig, tokenizer: Tokenizer, module: torch.nn.Module) -> str:
    """SHA-256 of a configuration, a tokenizer and the weights of a network, or of a task with its head."""
    # Without defaults, so that the hash stays when the model gets a new setting.
    defaults = {f.name: f.default for f in fields(MaskVLMConfig)}
    own = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    digest = hashlib.sha256(repr(sorted(own.items())).encode())
    digest.update(tokenizer.fingerprint.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TrainedModel(NetworkAndTokenizer):
    """A trained model: embeddings, matches, filled-in texts and images. `mvlm.load_model` makes one.

    It is also the pair (network, tokenizer): `network, tokenizer = mvlm.load_model(path)`.

    Images are what `mvlm.inference.images.ImageLike` lists, one or an iterable of them, or a split of a data set
    (`mvlm_dataloading.Dataset`). Iterables are read as they are needed, so they may be longer than the memory. Texts
    are put on one line with single blanks, as captions are when a data set is built. Those with more tokens than the
    model takes are refused, unless `truncate` is given; captions of a data set are truncated, as in evaluation. Results
    are on the CPU.

    All methods raise RunError for an image that cannot be used, ConfigError for a text or a setting, DataError for a
    broken data set.
    """

    precision: str
    """auto, bf16 or fp32 (`mvlm.device.autocast`)."""

    def __new__(cls, network: MaskVLM, tokenizer: Tokenizer, precision: str = "auto") -> "TrainedModel":
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: wanted {', '.join(PRECISIONS)}, got {precision!r}")
        self = super().__new__(cls, network.eval(), tokenizer)
        self.precision = precision
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.network.parameters()).device

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of configuration, weights and tokenizer. Embeddings of models with other hashes do not compare."""
        return hash_of(self.network.config, self.tokenizer, self.network)

    def embed_images(self, images: Images | Dataset, *, batch_size: int = BATCH, progress: bool = False) -> Tensor:
        """Contrastive embeddings of n images, float32 (n, E), of unit length.

        Args:
            batch_size: images of one forward pass.
            progress: show the progress, if the number of images is known.
        """
        found = list(_shown(self.image_embeddings(images, batch_size=batch_size), images, "images", progress))
        return torch.cat(found) if found else torch.empty(0, self.network.config.itc_width)

    def image_embeddings(self, images: Images | Dataset, *, batch_size: int = BATCH) -> Iterator[Tensor]:
        """Contrastive embeddings of images, batch by batch: float32 (up to batch_size, E)."""
        for batch in self.pixel_batches(images, batch_size):
            yield image_features(self.network, batch, self.precision).embedding.cpu()

    def embed_texts(
        self, texts: Texts | Dataset, *, batch_size: int = BATCH, progress: bool = False, truncate: bool = False
    ) -> Tensor:
        """Contrastive embeddings of n texts, float32 (n, E), of unit length. Of a data set, of all captions.

        Args:
            truncate: cut texts to the model's length, instead of an error.
        """
        batches = self.text_embeddings(texts, batch_size=batch_size, truncate=truncate)
        found = list(_shown(batches, texts, "texts", progress))
        return torch.cat(found) if found else torch.empty(0, self.network.config.itc_width)

    def text_embeddings(
        self, texts: Texts | Dataset, *, batch_size: int = BATCH, truncate: bool = False, clean: bool = True
    ) -> Iterator[Tensor]:
        """Contrastive embeddings of texts, batch by batch: float32 (up to batch_size, E).

        Args:
            clean: False for captions of a data set that are given as texts: they are taken as they stand.
        """
        if isinstance(texts, Dataset):
            dataset, truncate, clean = texts, True, False
            texts = (caption for i in range(len(dataset)) for caption in dataset.captions(i))
        length = self.network.config.text_length
        for batch in text_batches(each_text(texts), self.tokenizer, length, batch_size, truncate, clean):
            yield text_features(self.network, batch, self.tokenizer, self.precision).embedding.cpu()

    def similarity(self, images: Images | Dataset | Tensor, texts: Texts | Dataset | Tensor) -> Tensor:
        """Cosine similarity of every image with every text, float32 (n, m).

        Embeddings float (n, E) and (m, E), as `embed_images` and `embed_texts` return them, are taken as they are.
        """
        if not (isinstance(images, Tensor) and images.ndim == 2 and images.is_floating_point()):
            images = self.embed_images(images)
        return images @ (texts if isinstance(texts, Tensor) else self.embed_texts(texts)).T

    def match(
        self, images: Images | Dataset, texts: Texts, *, batch_size: int = BATCH, truncate: bool = False
    ) -> Matches:
        """Probability that each of n images and its text belong together, by ITM.

        One image goes with each of several texts, and one text with each of several images; else there are as many
        texts as images.
        """
        return pairs.match(self, images, texts, batch_size, truncate)

    def rerank(self, query: ImageLike, candidates: Images | Texts, *, truncate: bool = False) -> Ranking:
        """Order candidates by ITC and ITM together, as `mvlm eval retrieval` does.

        Args:
            query: a text (any `str`), and then the candidates are images; or an image, not as a `str`, and then the
                candidates are texts. `pathlib.Path` names an image file as a query.
        """
        return pairs.rerank(self, query, candidates, truncate)

    def classify(
        self, images: Images | Dataset, labels: Sequence[str], templates: Sequence[str] | None = None
    ) -> Classification:
        """Probability of each of m labels for n images, without training, from contrastive similarities.

        Args:
            labels: two or more names.
            templates: texts with {} for the label, such as "a photo of a {}". A label's embedding is the mean over
                templates, scaled to unit length. Default: the label alone.
        """
        return zero_shot.classify(self, images, labels, templates)

    def fill(self, text: str, image: ImageLike, top: int = 5, steps: int = 1) -> FilledText:
        """Guess the [MASK] tokens of a text from the rest of it and from its image.

        Args:
            text: text with [MASK] for every token to guess, such as "a [MASK] heart".
            top: guesses for each [MASK].
            steps: steps in which [MASK]s are replaced, the most probable first; later guesses see earlier ones.
        """
        pixels = load_image(image, self.network.config.image_size)
        return fill_text(self.network, self.tokenizer, text, pixels, top, self.precision, steps)

    def reconstruct(
        self,
        image: ImageLike,
        text: str,
        hide: NDArray[Any] | Tensor | None = None,
        *,
        seed: int = 0,
        steps: int = 1,
    ) -> Reconstruction:
        """Rebuild hidden patches of an image from its visible patches and a text.

        Args:
            hide: bool (h, w) of any size over the whole image, True = hidden: every patch that it touches. Default: a
                mask as in training, drawn from `seed`.
            steps: steps in which patches are rebuilt, those first that continue the patches beside them best.
        """
        pixels = load_image(image, self.network.config.image_size)
        return reconstruct_image(self.network, self.tokenizer, pixels, text, hide, seed, self.precision, steps)

    def attention(self, image: ImageLike, text: str) -> AttentionMaps:
        """Weights of each word of a text over the patches of an image: by layer and head, and by GradCAM on ITM.

        `mvlm.inference.overlay` draws them.
        """
        one_text("text", text)
        return attention_maps(self, load_image(image, self.network.config.image_size), text)

    def pixel_batches(self, images: Images | Dataset, batch_size: int) -> Iterator[Tensor]:
        """Images as the model takes them, batch by batch: uint8 (up to batch_size, 3, S, S)."""
        batch_size = whole_number("batch_size", batch_size)
        if isinstance(images, Dataset):
            loader = eval_loader(images, self.network, self.tokenizer, batch_size=batch_size)
            return (batch.images for batch, _ in loader)
        return load_batches(each_image(images), self.network.config.image_size, batch_size)


def _shown(batches: Iterator[Tensor], given: object, unit: str, progress: bool) -> Iterator[Tensor]:
    """The same batches, with a progress bar on request, if the number of items is known."""
    try:
        total = None if isinstance(given, str | bytes) else len(given)  # pyright: ignore[reportArgumentType]
    except TypeError:  # it has no length, or, as an array of one number, none that is known
        total = None
    if not progress or total is None:
        yield from batches
        return
    with WorkProgress(unit) as bar:
        done = 0
        for batch in batches:
            done += len(batch)
            bar.show(done, total, done)
            yield batch
