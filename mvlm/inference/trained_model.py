"""A trained model with its tokenizer, and the questions that it answers.

Shape legend: n images or pairs, m texts or labels, k candidates, B batch, E contrastive width, S image side.
"""

import copy
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm.device import chosen_precision
from mvlm.errors import ConfigError, whole_number
from mvlm.evaluation.evaluate import Evaluation, default_rerank, evaluate
from mvlm.evaluation.workspace import Workspace
from mvlm.files import new_folder
from mvlm.inference.answers import Strips, predictions
from mvlm.inference.attention_maps import AttentionMaps, matching_gradcam, word_maps, word_spans
from mvlm.inference.encode import (
    BATCH,
    ImageFeatures,
    TextFeatures,
    eval_loader,
    image_features,
    match_log_odds,
    rerank_scores,
    text_features,
)
from mvlm.inference.images import (
    ImageLike,
    Images,
    each_image,
    hide_patches,
    is_single_image,
    load_batches,
    load_image,
)
from mvlm.inference.masked import (
    FilledText,
    Guess,
    Reconstruction,
    fill_mask,
    hidden_patches,
    reconstruct,
    tokens_with_masks,
)
from mvlm.inference.texts import Texts, checked_texts, each_text, list_of_texts, text_batches
from mvlm.model.encoders import masked_patches
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.pretrained import TOKENIZER_FILE, write_model
from mvlm.progress import WorkProgress
from mvlm_dataloading import Dataset, Tokenizer
from mvlm_dataloading.loader.masking import draw_patch_masks


class Matches(NamedTuple):
    """Matches of n pairs of an image and a text, by ITM. Tensors are float32, on the CPU."""

    probability: Tensor
    """(n,), probability that the pair belongs together."""
    log_odds: Tensor
    """(n,), log(probability / (1 - probability)), before rounding."""


class Ranking(NamedTuple):
    """Candidates in order, best first. Tensors are on the CPU."""

    order: Tensor
    """int64 (k,), positions of the candidates as they were given."""
    score: Tensor
    """float32 (k,), ITC logit plus ITM's log-odds of each, falling (docs/explain/method.md)."""


class Classification(NamedTuple):
    """Labels of n images, by contrastive similarity."""

    labels: list[str]
    """The m labels, as they were given."""
    probability: Tensor
    """float32 (n, m), on the CPU; rows add up to 1."""

    @property
    def best(self) -> list[str]:
        """The likeliest label of each image."""
        return [self.labels[i] for i in self.probability.argmax(1).tolist()]


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


class TrainedModel:
    """A trained model: embeddings, matches, filled-in texts and images, figures, files. `mvlm.load_model` makes one.

    Images are what `mvlm.inference.images.ImageLike` lists, one or an iterable of them, or a split of a data set
    (`mvlm_dataloading.Dataset`). Iterables are read as they are needed, so they may be longer than the memory. Texts
    are put on one line with single blanks, as captions are when a data set is built. Those with more tokens than the
    model takes are refused, unless `truncate` is given; captions of a data set, and the texts of a task, are truncated,
    as in evaluation. Results are on the CPU.

    All methods raise RunError for an image that cannot be used, ConfigError for a text or a setting, DataError for a
    broken data set.
    """

    network: MaskVLM
    """The network, in evaluation mode."""
    tokenizer: Tokenizer
    """The tokenizer of its captions."""
    precision: str
    """auto, bf16 or fp32 (`mvlm.device.autocast`)."""
    source: Path | None
    """Checkpoint or exported folder that it was loaded from, if any."""
    task: Any
    """The `mvlm.tasks.task.Task` that it was fine-tuned for, with its head; None without one."""

    def __init__(
        self,
        network: MaskVLM,
        tokenizer: Tokenizer,
        precision: str = "auto",
        source: Path | None = None,
        task: Any = None,
    ) -> None:
        self.network, self.tokenizer, self.precision, self.source = network.eval(), tokenizer, precision, source
        self.task = task
        chosen_precision(self.device, precision)  # raises for an unknown one

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
            texts = (caption for captions in dataset.captions_of(range(len(dataset))) for caption in captions)
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
        found = [self._log_odds(*pair) for pair in self._feature_pairs(images, texts, batch_size, truncate)]
        log_odds = torch.cat(found) if found else torch.empty(0)
        return Matches(log_odds.sigmoid(), log_odds)

    def rerank(self, query: ImageLike, candidates: Images | Texts, *, truncate: bool = False) -> Ranking:
        """Order candidates by ITC and ITM together, as `mvlm eval retrieval` does.

        Args:
            query: a text (any `str`), and then the candidates are images; or an image, not as a `str`, and then the
                candidates are texts. `pathlib.Path` names an image file as a query.
        """
        images, texts = (candidates, query) if isinstance(query, str) else (query, candidates)
        scores = []
        for image, text in self._feature_pairs(cast(Images, images), cast(Texts, texts), BATCH, truncate):
            similarity = (image.embedding.double() * text.embedding.double()).sum(-1).cpu()
            scores.append(rerank_scores(self.network, similarity, self._log_odds(image, text)).float())
        joined = torch.cat(scores) if scores else torch.empty(0)
        found = joined.sort(descending=True, stable=True)
        return Ranking(found.indices, found.values)

    def classify(
        self, images: Images | Dataset, labels: Sequence[str], templates: Sequence[str] | None = None
    ) -> Classification:
        """Probability of each of m labels for n images, without training, from contrastive similarities.

        softmax over labels of cosine similarity / temperature, with the temperature that ITC learned (Radford et al.
        2021).

        Args:
            labels: two or more names.
            templates: texts with {} for the label, such as "a photo of a {}". A label's embedding is the mean over
                templates, scaled to unit length. Default: the label alone.
        """
        labels = list_of_texts("labels", labels)
        similarity = self.embed_images(images) @ self.label_embeddings(labels, templates).T  # (n, m)
        return Classification(labels, (self.network.log_scale.exp().item() * similarity).softmax(1))

    def label_embeddings(self, labels: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Embeddings of m labels, float32 (m, E), as `classify` compares them with images."""
        labels = list_of_texts("labels", labels)
        templates = ["{}"] if templates is None else list_of_texts("templates", templates)
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ConfigError(f"labels: wanted two or more different labels, got {list(labels)[:5]}")
        if not templates or any("{}" not in template for template in templates):
            raise ConfigError(
                f'templates: wanted texts with {{}} for the label, as in "a photo of a {{}}", got {templates}'
            )
        # One at a time: a label may be put into a template many times.
        texts = (template.replace("{}", label) for label in labels for template in templates)
        embeddings = self.embed_texts(texts).unflatten(0, (len(labels), len(templates)))  # (m, templates, E)
        return F.normalize(embeddings.mean(1), dim=-1)

    def predict(self, images: Strips, texts: Texts | None = None, *, batch_size: int = BATCH) -> list[dict[str, Any]]:
        """Predictions of a fine-tuned model for n samples, with fields as in `mvlm eval TASK --predictions`.

        {"answer": ...} of vqa, {"label": ...} of entailment and pairs, {"caption": ...} of caption.

        Args:
            images: one image with each of several texts, several images with one text, or as many images as texts. A
                task with n images a sample takes a list of n images, or an iterable of such lists.
            texts: questions, hypotheses or statements; None for captions.

        Raises:
            ConfigError: the model has no head (`mvlm finetune` trains one), or a text is refused.
        """
        task = self.task_for("predict")
        batch_size = whole_number("batch_size", batch_size)
        return list(predictions(task, self.tokenizer, images, texts, batch_size, self.precision))

    def answer(self, image: ImageLike, question: str) -> str:
        """The answer to a question about an image, of a model that was fine-tuned for vqa."""
        self.task_for("answer", "vqa")
        return self.predict(image, question)[0]["answer"]

    def entails(self, image: ImageLike, text: str) -> str:
        """Label of an image and a hypothesis, by a model fine-tuned for it: entailment, neutral or contradiction."""
        self.task_for("entails", "entailment")
        return self.predict(image, text)[0]["label"]

    def caption(self, image: ImageLike) -> str:
        """A caption of an image, of a model that was fine-tuned for caption."""
        self.task_for("caption", "caption")
        return self.predict(image)[0]["caption"]

    def task_for(self, what: str, name: str | None = None) -> Any:
        """The fine-tuned task of the model.

        ConfigError if the model has no task with predictions, or one of another name than `name`.

        what: method or command that needs the task, for the error.
        """
        task = self.task
        if task is None or task.whole_batch or name not in (None, task.name):
            found = "one without a task's head" if task is None else f"one of {task.name}"
            wanted = name or "TASK"
            raise ConfigError(
                f"{what}: wanted a model that was fine-tuned for {name or 'a task with predictions'}, got {found}; "
                f"`mvlm finetune {wanted}` makes one"
            )
        return task

    def fill(self, text: str, image: ImageLike, top: int = 5, steps: int = 1) -> FilledText:
        """Guess the [MASK] tokens of a text from the rest of it and from its image.

        Args:
            text: text with [MASK] for every token to guess, such as "a [MASK] heart".
            top: guesses for each [MASK].
            steps: steps in which [MASK]s are replaced, an equal number in each, rounded up: those whose first guess is
                the most probable. Later guesses see earlier ones.
        """
        top, steps = whole_number("top", top, 1, self.tokenizer.vocab_size), whole_number("steps", steps)
        tokens = tokens_with_masks(text, self.tokenizer, self.network.config.text_length)
        pixels = load_image(image, self.network.config.image_size)[None]
        ids = (tokens == self.tokenizer.mask_id).nonzero()[:, 0]
        steps = min(steps, len(ids))
        guesses, probabilities = torch.zeros(len(ids), top, dtype=torch.int64), torch.zeros(len(ids), top)
        left = torch.arange(len(ids))  # numbers of the [MASK]s that are not filled in yet
        for step in range(steps):
            length, places = [len(tokens)], ids[left]
            found = fill_mask(self.network, self.tokenizer, pixels, tokens, length, places, top, self.precision)
            order = found[1][:, 0].sort(descending=True, stable=True).indices
            number = -(-len(left) // (steps - step))
            surest, rest = order[:number], order[number:].sort().values
            guesses[left[surest]], probabilities[left[surest]] = found[0][surest], found[1][surest]
            tokens[ids[left[surest]]] = found[0][surest, 0]
            left = left[rest]
        return FilledText(
            self.tokenizer.decode(tokens.tolist()),
            [
                [Guess(self.tokenizer.decode([token]), p) for token, p in zip(row, chances, strict=True)]
                for row, chances in zip(guesses.tolist(), probabilities.tolist(), strict=True)
            ],
        )

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
        config = self.network.config
        seed, steps = whole_number("seed", seed, None), whole_number("steps", steps)
        texts = checked_texts([text], self.tokenizer, config.text_length)
        pixels, side = load_image(image, config.image_size)[None], config.image_size // config.patch_size
        if hide is None:
            drawn = draw_patch_masks(seed, 0, [0], image_size=config.image_size, masking=config)
            ids = torch.from_numpy(drawn)  # (1, K)
        else:
            ids = hidden_patches(hide, side)
        masked = hide_patches(pixels, ids, config.patch_size)
        rebuilt = reconstruct(self.network, self.tokenizer, pixels, texts, ids, self.precision, steps)
        hidden = masked_patches(ids, config.num_patches).unflatten(1, (side, side))[0].numpy()
        image, masked, rebuilt = (x[0].permute(1, 2, 0).numpy() for x in (pixels, masked, rebuilt))
        return Reconstruction(image, masked, rebuilt, hidden)

    def attention(self, image: ImageLike, text: str) -> AttentionMaps:
        """Weights of each word of a text over the patches of an image: by layer and head, and by GradCAM on ITM.

        In float32 whatever the model's precision. `mvlm.inference.attention_maps` draws them.
        """
        texts = checked_texts([text], self.tokenizer, self.network.config.text_length)
        pixels = load_image(image, self.network.config.image_size)
        v = image_features(self.network, pixels[None], "fp32").v
        w = text_features(self.network, texts, self.tokenizer, "fp32").w.rows[None]  # (1, L, C), no padding
        log_odds, layers, cams = matching_gradcam(self.network, v, w)
        spans = [("[CLS]", 0, 1), *word_spans(self.tokenizer, texts[0])]
        places = [(start, stop) for _, start, stop in spans]
        return AttentionMaps(
            [word for word, _, _ in spans],
            word_maps(torch.stack([layer.weights[0] for layer in layers]), places),
            word_maps(torch.stack([cam[0] for cam in cams]), places),
            log_odds.item(),
        )

    def evaluate(
        self,
        split: Dataset,
        train: Dataset | None = None,
        rerank: int | None = None,
        workspace: Workspace | None = None,
        edits: Dataset | None = None,
    ) -> Evaluation:
        """Measure retrieval, cross-modal gain and trivial losses on a split, as `mvlm eval retrieval` does.

        Args:
            train: training split, for the median predictor and the known concepts; None for data without one.
            rerank: candidates of each query for ITM to re-rank; 0 ranks by ITC alone. Default: 32, or 0 for a model
                that was trained without ITM.
            workspace: ranks that share the work, and the folder of its arrays. Default: one rank, in memory.
            edits: the data set's split of edited images, for two-way choices (`mvlm.evaluation.two_way`).
        """
        rerank = default_rerank(self.network) if rerank is None else whole_number("rerank", rerank, 0)
        workspace = workspace or Workspace()
        return evaluate(self.network, split, train, self.tokenizer, rerank, self.precision, workspace, edits)

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors, config.json and tokenizer.json to a new or empty folder, for `mvlm.load_model`."""
        with new_folder(Path(folder)) as out:
            self._write(out)

    def export(
        self,
        folder: Path | str,
        format: Literal["pt2", "onnx", "hub"],
        *,
        hub_id: str | None = None,
        data: Path | str | None = None,
    ) -> dict[str, float]:
        """Write the model for another runtime, or for the Hugging Face hub, to a new or empty folder.

        Args:
            format: pt2 (programs of torch.export) or onnx, each with tokenizer.json and preprocess.json; or hub, what
                `save` writes and a model card, of a model that was loaded from a run.
            hub_id: for the card, id owner/name. Default: owner/ and the run's name.
            data: for the card, the run's training data, if they are no longer where its config.json says.

        Returns:
            For each program's file, its largest difference from the network; of hub, none.

        Raises:
            RunError: the folder holds files, or a program differs too much; there is no run or no licence for the card.
            ConfigError: a package is missing, a part is too large for ONNX, or `hub_id` is no id.
        """
        with new_folder(Path(folder)) as out:
            if format == "hub":
                from mvlm.portable.hub import CARD, model_card

                card = model_card(self.source or Path("a model in memory"), self.network, self.sha256, data, hub_id)
                self._write(out)
                (out / CARD).write_text(card, encoding="utf-8")
                return {}
            from mvlm.portable.programs import write_programs_folder

            network = self.network if self.device.type == "cpu" else copy.deepcopy(self.network).cpu()
            return write_programs_folder(network, self.tokenizer, self.sha256, out, format)

    def _write(self, folder: Path) -> None:
        write_model(self.network, folder)
        self.tokenizer.save(folder / TOKENIZER_FILE)

    def pixel_batches(self, images: Images | Dataset, batch_size: int) -> Iterator[Tensor]:
        """Images as the model takes them, batch by batch: uint8 (up to batch_size, 3, S, S)."""
        batch_size = whole_number("batch_size", batch_size)
        if isinstance(images, Dataset):
            loader = eval_loader(images, self.network, self.tokenizer, batch_size=batch_size)
            return (batch.images for batch, _ in loader)
        return load_batches(each_image(images), self.network.config.image_size, batch_size)

    def _log_odds(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """ITM's log-odds that each of B pairs belongs together, float32 (B,) on the CPU.

        There are B images and B texts; or one image goes with B texts, or one text with B images.
        """
        images, texts = torch.broadcast_tensors(torch.arange(len(image.v)), torch.arange(len(text.w.packing)))
        return match_log_odds(self.network, image.v, text.w, images, texts, self.precision).cpu()

    def _feature_pairs(
        self, images: Images | Dataset, texts: Texts, batch_size: int, truncate: bool
    ) -> Iterator[tuple[ImageFeatures, TextFeatures]]:
        """Yield the features of n pairs of an image and a text, in batches.

        A single image goes with every text, a single text with every image; it is encoded once.
        """
        length = self.network.config.text_length
        pixels = self.pixel_batches(images, batch_size)
        words = text_batches(each_text(texts), self.tokenizer, length, batch_size, truncate)
        encoded_images = (image_features(self.network, batch, self.precision) for batch in pixels)
        encoded_texts = (text_features(self.network, batch, self.tokenizer, self.precision) for batch in words)
        if not isinstance(images, Dataset) and is_single_image(images):
            image = next(encoded_images)
            yield from ((image, text) for text in encoded_texts)
        elif isinstance(texts, str):
            text = next(encoded_texts)
            yield from ((image, text) for image in encoded_images)
        else:
            for image, text in itertools.zip_longest(encoded_images, encoded_texts):
                if image is None or text is None or len(image.v) != len(text.embedding):
                    raise ConfigError(
                        "texts: wanted as many texts as images, or a single image or text that is not in a list, found "
                        "different numbers; pair them"
                    )
                yield image, text


def _shown(batches: Iterator[Tensor], given: object, unit: str, progress: bool) -> Iterator[Tensor]:
    """Yield batches unchanged, and show a progress bar if `progress` and if `given`, the input, has a length.

    unit: plural noun of the input's items.
    """
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
