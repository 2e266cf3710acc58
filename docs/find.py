"""Find drawings by texts: python docs/find.py OUT.png "a red fruit" "something with wheels"."""

import sys

import torch

from clip import CLIP
from maskgit.evaluation.sets import open_pixels
from maskgit.sheet import sheet, to_pictures

out, *queries = sys.argv[1:]
model = CLIP.from_pretrained("emoji")
images = torch.cat(list(open_pixels("emoji").batches(256))) / 255  # (N, 3, 64, 64)
with torch.no_grad():
    found = model.encode_image(model.preprocess(images))  # (N, E)
    scores = model.encode_text(model.tokenize(queries)) @ found.T  # (Q, N)
groups = [
    (query, to_pictures(images[best]))
    for query, best in zip(queries, scores.topk(8).indices, strict=True)
]
sheet(groups, "Training drawings, found by text").save(out)
