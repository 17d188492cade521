"""Classify one picture with a distilled student, using open_clip alone: nothing of cliprd is imported here.

    python examples/emoji/classify.py MODEL_FOLDER PICTURE [CLASSNAMES_FILE]

The classes are the 1,913 emoji of classnames.txt beside this file; any text file with one class a line will do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import open_clip
import torch
from PIL import Image

NUM_SHOWN = 5
CLASSES_PER_CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description="Classify one picture with a distilled CLIP student, with plain open_clip.")
    parser.add_argument("model_folder", type=Path, help="folder with open_clip_config.json and the weights")
    parser.add_argument("picture", type=Path)
    parser.add_argument("classnames", type=Path, nargs="?", default=Path(__file__).with_name("classnames.txt"))
    arguments = parser.parse_args()

    name = f"local-dir:{arguments.model_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()

    classnames = arguments.classnames.read_text().splitlines()
    picture = preprocess(Image.open(arguments.picture).convert("RGB")).unsqueeze(0)
    with torch.inference_mode():
        image_features = model.encode_image(picture, normalize=True)
        chunks = [classnames[start : start + CLASSES_PER_CHUNK] for start in range(0, len(classnames), CLASSES_PER_CHUNK)]
        text_features = torch.cat([model.encode_text(tokenizer(chunk), normalize=True) for chunk in chunks])
        probabilities = (model.logit_scale.exp() * image_features @ text_features.T).softmax(dim=-1)[0]
    best = probabilities.topk(min(NUM_SHOWN, len(classnames)))
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{probability:6.1%}  {classnames[index]}")


if __name__ == "__main__":
    main()
