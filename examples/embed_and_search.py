"""Embeddings of a collection, and search in it by a text.

    python examples/embed_and_search.py --model runs/demo --data data/emoji "red heart" "cat face"

Prints, for each query, the captions of the five most similar images of a split (--split, by default test), and the
order that the matching head (ITM) gives them. `mvlm embed` and `mvlm search` do the same for millions of images, in
files and an index.
"""

import argparse
from pathlib import Path

import torch

import mvlm
from mvlm_dataloading import open_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("queries", nargs="*", default=["red heart", "cat face"])
parser.add_argument("--model", type=Path, default="runs/demo")
parser.add_argument("--data", type=Path, default="data/emoji")
parser.add_argument("--split", default="test")
parser.add_argument("--top", type=int, default=5)
arguments = parser.parse_args()

model = mvlm.load_model(arguments.model)
images = open_dataset(arguments.data, arguments.split)
captions = [images.captions(i)[0] for i in range(len(images))]

# Images are embedded once, and each query after that is a product: vectors have unit length.
gallery = model.embed_images(images)  # float32 (n, E)
similarity = model.embed_texts(arguments.queries) @ gallery.T  # (queries, n)
found = torch.topk(similarity, min(arguments.top, len(images))).indices.tolist()

# ITM looks at a text and an image together. It is slower and more exact, so it orders the best candidates only.
for query, candidates in zip(arguments.queries, found, strict=True):
    pictures = [images.image_bytes(i) for i in candidates]
    reranked = [candidates[place] for place in model.rerank(query, pictures).order.tolist()]
    print(f"{query}: {', '.join(captions[i] for i in candidates)}")
    print(f"  by ITM: {', '.join(captions[i] for i in reranked)}")
