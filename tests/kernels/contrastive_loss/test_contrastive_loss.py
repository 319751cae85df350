"""Contrastive terms against explicit numpy in float64, and their draws against the argmax of whole rows and columns."""

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvlm_kernels import ContrastiveTerms, contrastive_loss, contrastive_terms, registration, use_backend
from mvlm_kernels.contrastive_loss import reference
from mvlm_kernels.contrastive_loss.noise import gumbel_noise, noise_key

ROWS, COLUMNS, WIDTH = 7, 19, 5
BLOCKS = [(1, 1), (15, 4), (1 << 20, 1024)]
"""Logits, and most rows, of a block: one logit, blocks of no divisor of any size, one block."""
VARIANTS = {
    "infonce": {},
    "sigmoid": {"bias": True},
    "infonce, shared": {"shared_positives": True},
    "sigmoid, shared": {"bias": True, "shared_positives": True},
}


def inputs(rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = torch.float64, bias: bool = False) -> Any:
    """Tensors that learn, and the ids: images and captions that several pairs share."""
    draw = np.random.default_rng(5)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (draw.normal(size=(k, WIDTH)) for k in (rows, columns))]
    leaves = {"image": unit[0], "text": unit[1], "log_scale": np.array([1.9])} | ({"bias": np.array([-1.3])} * bias)
    ids = {"rows": draw.permutation(columns)[:rows], "image_id": draw.integers(0, columns // 2, columns)}
    ids["text_id"] = draw.integers(0, columns, columns)
    return (
        {name: torch.tensor(x).to(dtype).requires_grad_() for name, x in leaves.items()},
        {name: torch.tensor(x) for name, x in ids.items()},
    )
