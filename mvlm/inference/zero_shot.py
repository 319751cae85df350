"""Classification without training: the label whose text is most similar to the image.

Shape legend: n images, m labels, t templates, E contrastive width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from mvlm.errors import ConfigError
from mvlm.inference.arguments import list_of_texts
from mvlm.inference.images import Images
from mvlm.inference.results import Classification
from mvlm_dataloading import Dataset

if TYPE_CHECKING:
    from mvlm.inference.trained_model import TrainedModel


def classify(
    model: "TrainedModel", images: Images | Dataset, labels: Sequence[str], templates: Sequence[str] | None = None
) -> Classification:
    """Probabilities of m labels for n images; `TrainedModel.classify` has the arguments.

    softmax over labels of cosine similarity / temperature, with the temperature that ITC learned (Radford et al. 2021).
    """
    labels = list_of_texts("labels", labels)
    text = label_embeddings(model, labels, templates)  # (m, E)
    similarity = model.embed_images(images) @ text.T  # (n, m)
    return Classification(labels, (model.network.log_scale.exp().item() * similarity).softmax(1))


def label_embeddings(model: "TrainedModel", labels: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
    """Embeddings of labels, float32 (m, E): the mean over templates, scaled to unit length."""
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
    embeddings = model.embed_texts(texts).unflatten(0, (len(labels), len(templates)))  # (m, t, E)
    return F.normalize(embeddings.mean(1), dim=-1)
