#!/usr/bin/env python3
"""Writes JSON-lines shards of photo-like JPEGs with captions and regions, and a WordPiece vocabulary for them.

The pictures have the sizes of COCO's (640x480, 480x640, 640x427, 500x375) and, on average, its weight (some 160 KB a
file: 13.5 GB for the 82,783 of train2014), at quality 95 with 4:2:0 chroma: smooth light, shaded objects with sharp
edges, and noise whose amplitude falls with frequency as natural images' does (Field 1987), less steeply in the fine
detail, so that it can weigh what a photograph's does. Everything follows from --seed.

    OUT/shard-00.jsonl ...  {"image_id", "binary": base64, "caption": [5 strings],
                             "elems": [{"bb": [x, y, w, h], "caption": string, "attributes": [strings]}]}
    OUT/vocab.txt           30,522 entries, as many as BERT's; [PAD] [UNK] [CLS] [SEP] [MASK] are 0, 100 to 103
"""

import argparse
import base64
import io
import json
import math
import multiprocessing
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# About as frequent as in COCO, where most pictures are 640 pixels at their longer side.
SIZES = [((640, 480), 0.5), ((480, 640), 0.2), ((640, 427), 0.2), ((500, 375), 0.1)]
# Of a 640x480 picture; smaller ones weigh less, so that the mean over all is near COCO's.
MEAN_KB, SPREAD = 172.0, 0.35
QUALITY = 95

COLOURS = ["red", "blue", "green", "white", "black", "brown", "yellow", "grey", "orange", "striped", "wooden", "shiny"]
THINGS = [
    "dog", "cat", "horse", "bicycle", "bus", "bench", "umbrella", "skateboarder", "snowboard", "laptop", "pizza",
    "kite", "zebra", "giraffe", "surfboard", "sandwich", "keyboard", "motorcycle", "traffic light", "fire hydrant",
    "teddy bear", "wine glass", "clock tower", "elephants", "bananas", "train", "boat", "man", "woman", "child",
]
SCENES = [
    "field", "beach", "kitchen", "street", "park", "harbour", "living room", "hillside", "parking lot", "crosswalk",
    "mountain", "bedroom", "station", "table", "river",
]
ACTIONS = [
    "standing next to", "sitting on top of", "riding past", "looking at", "parked in front of", "lying beside",
    "walking towards", "leaning against", "to the left of", "flying over",
]
TAILS = [
    "on a sunny day", "in the background", "with people watching", "near some trees", "under a cloudy sky",
    "at night", "during the winter", "while it's raining", "in black-and-white", "by the water",
]
PIECES = ["##ed", "##ing", "##er", "##board", "##cycle", "##side", "##walk"]
# Words that take several pieces, as one word of seven or so does with BERT's vocabulary.
SPLIT = {"skateboarder", "snowboard", "surfboard", "motorcycle", "hillside", "crosswalk", "elephants", "bananas"}
VOCABULARY = 30522


def colour(rng):
    """Mostly grey, as things are."""
    return np.clip(rng.uniform(40, 215) + rng.normal(0, 28, 3), 15, 240).astype(np.float32)


def noise(rng, width, height, exponent):
    """A field of unit deviation whose amplitude falls as 1 / frequency ** exponent."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**exponent
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(height, width))
    return (field / field.std()).astype(np.float32)


def layers(rng, width, height, boxes):
    """The picture's smooth part and its detail, as (height, width, 3) floats."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    u, v = x / width, y / height
    horizon = rng.uniform(0.3, 0.7)
    blend = 1.0 / (1.0 + np.exp(-(v - horizon) * rng.uniform(6.0, 60.0)))[..., None]
    smooth = colour(rng) * (1.0 - blend) + colour(rng) * blend
    for _ in range(3):
        cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.2, 0.7)
        light = rng.uniform(-60, 60) + rng.normal(0, 12, 3)
        smooth += light * np.exp(-((u - cx) ** 2 + (v - cy) ** 2) / radius**2)[..., None]
    smooth += 18.0 * noise(rng, width, height, 1.6)[..., None]
    smooth += 9.0 * np.stack([noise(rng, width, height, 1.8) for _ in range(3)], axis=-1)
    # Part of a photograph is out of focus: its detail fades.
    focus = np.clip(0.9 + 0.3 * noise(rng, width, height, 2.0), 0.3, 1.4)
    detail = (noise(rng, width, height, 0.6) * focus)[..., None] * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    for left, top, w, h in boxes:
        mask = Image.new("L", (width, height))
        draw = ImageDraw.Draw(mask)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((left, top, left + w - 1, top + h - 1), fill=255)
        elif kind == 1:
            draw.rounded_rectangle((left, top, left + w - 1, top + h - 1), radius=min(w, h) // 6, fill=255)
        else:
            turns = np.sort(rng.uniform(0, 2 * math.pi, 8))
            points = [(left + w / 2 * (1 + math.cos(t)), top + h / 2 * (1 + math.sin(t))) for t in turns]
            draw.polygon(points, fill=255)
        alpha = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32)[..., None] / 255.0
        shade = ((x - left) / w * rng.uniform(-50, 50) + (y - top) / h * rng.uniform(-70, 70))[..., None]
        surface = colour(rng) + shade
        if rng.random() < 0.3:
            angle, period = rng.uniform(0, math.pi), rng.uniform(8, 40)
            wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
            surface = surface + wave[..., None] * (rng.uniform(-40, 40) + rng.normal(0, 10, 3))
        smooth = smooth * (1.0 - alpha) + surface * alpha
        detail = detail * (1.0 - alpha * rng.uniform(0.0, 0.5))
    grain = rng.normal(0.0, 1.2, (height, width, 1)).astype(np.float32)
    return smooth.astype(np.float32), detail.astype(np.float32), grain


def jpeg(smooth, detail, grain, gain):
    pixels = np.clip(smooth + gain * detail + grain, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return out.getvalue()


def picture(rng, width, height, boxes):
    """A JPEG whose size is drawn from a log-normal law: the detail's contrast is bisected for it."""
    pixels_of_vga = width * height / (640 * 480)
    drawn = MEAN_KB * math.exp(SPREAD * rng.standard_normal() - SPREAD**2 / 2)
    target = 1000 * pixels_of_vga * min(max(drawn, 60.0), 400.0)
    parts = layers(rng, width, height, boxes)
    low, high = 0.0, 60.0
    for _ in range(7):
        gain = (low + high) / 2
        data = jpeg(*parts, gain)
        low, high = (gain, high) if len(data) < target else (low, gain)
    return data


def choose(rng, items):
    return items[rng.integers(len(items))]


def thing(rng):
    return f"{choose(rng, COLOURS)} {choose(rng, THINGS)}" if rng.random() < 0.6 else choose(rng, THINGS)


def caption(rng):
    """A sentence of 8 to 14 words."""
    while True:
        parts = ["A", thing(rng), choose(rng, ACTIONS), "a", thing(rng)]
        if rng.random() < 0.5:
            parts += ["in a" if rng.random() < 0.5 else "near the", choose(rng, SCENES)]
        parts.append(choose(rng, TAILS))
        text = " ".join(parts) + "."
        if 8 <= len(text.split()) <= 14:
            return text


def boxes_in(rng, width, height):
    """3 to 8 boxes of whole pixels inside the picture."""
    boxes = []
    for _ in range(rng.integers(3, 9)):
        w, h = (int(side * rng.uniform(0.08, 0.6)) for side in (width, height))
        boxes.append((int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h))
    return boxes


def record(seed, index):
    rng = np.random.default_rng([seed, index])
    sizes, weights = zip(*SIZES)
    width, height = sizes[rng.choice(len(sizes), p=weights)]
    boxes = boxes_in(rng, width, height)
    data = picture(rng, width, height, boxes)
    elems = []
    for box in boxes:
        alone = rng.random() < 0.5
        text = choose(rng, THINGS) if alone else f"{choose(rng, THINGS)} {choose(rng, ACTIONS)} a {thing(rng)}"
        attributes = [str(name) for name in rng.choice(COLOURS, rng.integers(1, 4), replace=False)]
        elems.append({"bb": list(box), "caption": text, "attributes": attributes})
    fields = {
        "image_id": index,
        "binary": base64.b64encode(data).decode("ascii"),
        "caption": [caption(rng) for _ in range(5)],
        "elems": elems,
    }
    return len(data), json.dumps(fields)


def vocabulary(seed):
    """Special tokens where BERT has them, characters, the words of the captions but for a few that fall into pieces,
    and made-up words up to BERT's number of entries."""
    entries = ["[PAD]"] + [f"[unused{i}]" for i in range(99)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    entries += list(characters) + [f"##{c}" for c in characters] + list("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~") + PIECES
    known = set(entries)
    phrases = COLOURS + THINGS + SCENES + ACTIONS + TAILS + ["a in near the black and white its"]
    words = {w.replace("'", "") for p in phrases for w in p.replace("-", " ").split()}
    words = sorted(words - SPLIT) + ["skate", "snow", "surf", "motor", "hill", "cross", "elephant", "banana"]
    rng = np.random.default_rng([seed, 1 << 32])
    letters = list("abcdefghijklmnopqrstuvwxyz")
    for word in words:
        if word not in known:
            known.add(word)
            entries.append(word)
    while len(entries) < VOCABULARY:
        word = "".join(rng.choice(letters, rng.integers(4, 10)))
        if rng.random() < 0.2:
            word = "##" + word[:4]
        if word not in known and word not in SPLIT:
            known.add(word)
            entries.append(word)
    return entries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write into")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.images < 1 or not 1 <= arguments.shards <= arguments.images:
        parser.error("there must be an image, and a shard must hold one")
    os.makedirs(arguments.out, exist_ok=True)
    with open(os.path.join(arguments.out, "vocab.txt"), "w", encoding="utf-8") as file:
        file.writelines(entry + "\n" for entry in vocabulary(arguments.seed))
    sizes = []
    with multiprocessing.Pool(arguments.workers) as pool:
        jobs = ((arguments.seed, index) for index in range(arguments.images))
        records = iter(pool.starmap(record, jobs, chunksize=4))
        for shard in range(arguments.shards):
            count = arguments.images * (shard + 1) // arguments.shards - arguments.images * shard // arguments.shards
            with open(os.path.join(arguments.out, f"shard-{shard:02}.jsonl"), "w", encoding="utf-8") as file:
                for _ in range(count):
                    size, line = next(records)
                    sizes.append(size)
                    file.write(line + "\n")
    kilobytes = np.array(sizes) / 1000
    summary = {
        "images": len(sizes),
        "mean_kb": round(float(kilobytes.mean()), 1),
        "min_kb": round(float(kilobytes.min()), 1),
        "max_kb": round(float(kilobytes.max()), 1),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
