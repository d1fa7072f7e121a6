#!/usr/bin/env python3
"""Times PyTorch's DataLoader on X-VLM's two pre-training streams: what a user of the original has.

Image-text stream: decode (Pillow), RandomResizedCrop(224, scale (0.2, 1), bicubic), flip, RandAugment(2, 7) of ten
operations, ToTensor, Normalize (torchvision); the caption cleaned, tokenised (transformers' BertTokenizer) and masked.
Region stream: decode, a crop around a drawn region, flip, bicubic resize, RandAugment of the five colour operations,
ToTensor, Normalize; up to 5 texts an image (the caption, then regions of which more than half is inside the crop), each
with a mask over the 7x7 patches; 48 images make a batch of 128 texts.

Prints one JSON object a line. CPU seconds are those of the main process and of all workers.

    data_loader.py SHARDS                 both streams, --passes timed passes each after a pass to warm up
    data_loader.py SHARDS --profile       CPU milliseconds an image for each step, in this one process
    data_loader.py SHARDS --serve         one timed pass for each line "image-text" or "region" read from stdin, to
                                          alternate with another program's passes; {"ready": ...} is printed first
"""

import argparse
import base64
import glob
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cv2
import numpy as np
import PIL
import torch
import torchvision
import transformers
from PIL import Image, features
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional
from transformers import BertTokenizer

from randaugment import ALL, COLOUR, RandAugment

RESOLUTION, PATCH = 224, 32
PATCHES = RESOLUTION // PATCH
MAX_WORDS = MAX_TOKENS = 40
MASK_PROBABILITY, MAX_MASKS = 0.25, 8
SKIPGRAM_PROBABILITY, SKIPGRAM_SIZE = 0.2, 3
MAX_REGIONS, LEAST_PART_INSIDE = 5, 0.5
IGNORED = -100
BATCH, REGION_IMAGES = 128, 48
# OpenAI CLIP's.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
STREAMS = ("image-text", "region")


class Steps:
    """CPU seconds of this thread spent in each step since the last lap."""

    def __init__(self):
        self.seconds, self.last = {}, time.thread_time()

    def start(self):
        self.last = time.thread_time()

    def lap(self, name):
        now = time.thread_time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


class NoSteps:
    def start(self):
        pass

    def lap(self, name):
        pass


class Texts:
    """Cleaning, tokens, and masks."""

    REMOVED = re.compile(r"([,.'!?\"()*#:;~])")
    SPACES = re.compile(r"\s{2,}")

    def __init__(self, vocabulary):
        self.tokenizer = BertTokenizer(vocabulary)
        ids = self.tokenizer.get_vocab()
        self.tokens = [token for token, _ in sorted(ids.items(), key=lambda entry: entry[1])]

    def clean(self, text):
        text = self.REMOVED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
        text = self.SPACES.sub(" ", text).rstrip("\n").strip(" ")
        words = text.split(" ")
        if len(words) > MAX_WORDS:
            text = " ".join(words[:MAX_WORDS])
        if not text:
            raise ValueError("empty caption")
        return text

    def whole_words(self, tokens, first, end):
        while first > 0 and tokens[first].startswith("##"):
            first -= 1
        while end < len(tokens) and tokens[end].startswith("##"):
            end += 1
        return first, end

    def masked(self, tokens):
        """The tokens with some masked, and the positions of these: whole words, at times two or three in a row."""
        tokens = list(tokens)
        wanted = min(MAX_MASKS, max(1, int(round(len(tokens) * MASK_PROBABILITY))))
        candidates = list(range(1, len(tokens)))
        random.shuffle(candidates)
        positions = set()
        for position in candidates:
            if len(positions) >= wanted:
                break
            if position in positions:
                continue
            length = random.randint(2, SKIPGRAM_SIZE) if random.random() < SKIPGRAM_PROBABILITY else 1
            first, end = self.whole_words(tokens, position, position + length)
            positions.update(range(max(first, 1), min(end, len(tokens))))
        positions = list(positions)
        if len(positions) > wanted:
            random.shuffle(positions)
            positions = positions[:wanted]
        for position in positions:
            if random.random() < 0.8:
                tokens[position] = self.tokenizer.mask_token
            elif random.random() < 0.5:
                tokens[position] = self.tokens[random.randint(0, len(self.tokens) - 1)]
        return tokens, positions

    def __call__(self, text):
        """Token ids, their mask, masked ids, positions of the masked, ids at these; all lists of fixed length."""
        tokenizer = self.tokenizer
        tokens = [tokenizer.cls_token] + tokenizer.tokenize(self.clean(text))[: MAX_TOKENS - 1]
        ids = tokenizer.convert_tokens_to_ids(tokens)
        masked, positions = self.masked(tokens)
        masked_ids = tokenizer.convert_tokens_to_ids(masked)
        targets = [ids[position] for position in positions]
        padding, unused = MAX_TOKENS - len(tokens), MAX_MASKS - len(positions)
        return (
            ids + [tokenizer.pad_token_id] * padding,
            [1] * len(tokens) + [0] * padding,
            masked_ids + [tokenizer.pad_token_id] * padding,
            positions + [0] * unused,
            targets + [IGNORED] * unused,
        )


def one_of(value):
    return random.choice(value) if isinstance(value, list) else value


class Shards(IterableDataset):
    """`images` records of JSON-lines files in a pass: a worker has its part of the files, in shuffled order, over and
    over until its part of the images is done. Each worker makes whole batches."""

    def __init__(self, files, images, group, texts, steps):
        super().__init__()
        self.files, self.images, self.group, self.texts, self.steps = files, images, group, texts, steps
        self.to_tensor, self.normalize = transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)

    def lines(self):
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        files = self.files[len(self.files) * index // workers : len(self.files) * (index + 1) // workers]
        left = math.ceil(self.images / workers / self.group) * self.group
        while True:
            random.shuffle(files)
            for file in files:
                with open(file, encoding="utf-8") as lines:
                    for line in lines:
                        yield line
                        left -= 1
                        if left == 0:
                            return

    def __iter__(self):
        for line in self.lines():
            self.steps.start()
            record = json.loads(line)
            data = base64.b64decode(record["binary"])
            self.steps.lap("record")
            image = Image.open(io.BytesIO(data)).convert("RGB")
            self.steps.lap("decode")
            yield self.sample(record, image)

    def finished(self, image):
        """From an array of bytes to the model's input."""
        image = self.to_tensor(image)
        self.steps.lap("to_tensor")
        image = self.normalize(image)
        self.steps.lap("normalize")
        return image


class ImageText(Shards):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.crop = transforms.RandomResizedCrop(
            RESOLUTION, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC
        )
        self.flip, self.augment = transforms.RandomHorizontalFlip(), RandAugment(ALL)

    def sample(self, record, image):
        image = self.crop(image)
        self.steps.lap("resize")
        image = self.flip(image)
        self.steps.lap("flip")
        image = self.augment(np.array(image))
        self.steps.lap("augment")
        image = self.finished(image)
        texts = self.texts(one_of(record["caption"]))
        self.steps.lap("text")
        return (image, *texts)

    def collate(self, samples):
        self.steps.start()
        images, *texts = zip(*samples)
        batch = [torch.stack(images)] + [torch.tensor(column, dtype=torch.long) for column in texts]
        self.steps.lap("collate")
        return batch


class Region(Shards):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.augment = RandAugment(COLOUR)

    def sample(self, record, image):
        width, height = image.size
        x, y, w, h = map(int, random.choice(record["elems"])["bb"])
        if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
            raise ValueError("region outside of the picture")
        left, top = random.randint(0, x), random.randint(0, y)
        right, bottom = random.randint(x + w, width), random.randint(y + h, height)
        image = image.crop((left, top, right, bottom))
        flipped = random.random() < 0.5
        if flipped:
            image = functional.hflip(image)
        self.steps.lap("flip")
        image = functional.resize(image, [RESOLUTION, RESOLUTION], interpolation=InterpolationMode.BICUBIC)
        self.steps.lap("resize")
        image = self.augment(np.array(image))
        self.steps.lap("augment")
        image = self.finished(image)
        rows = [(*self.texts(one_of(record["caption"])), self.patches(0, 0, 1, 1), torch.tensor([0.5, 0.5, 1, 1]), 1)]
        for element in random.sample(record["elems"], len(record["elems"])):
            if len(rows) == MAX_REGIONS:
                break
            box = self.visible(element["bb"], (left, top, right, bottom), flipped)
            if box is not None:
                x, y, w, h = box
                text = one_of(element["caption"])
                if "attributes" in element:
                    text = one_of(element["attributes"]) + " " + text
                target = torch.tensor([x + w / 2, y + h / 2, w, h])
                rows.append((*self.texts(text), self.patches(*box), target, 0))
        self.steps.lap("text")
        return image, rows

    @staticmethod
    def visible(box, crop, flipped):
        """The part of a box inside the crop as (x, y, w, h) in parts of the view, if more than half of it is inside."""
        x, y, w, h = map(int, box)
        left, top, right, bottom = crop
        inside = max(left, x), max(top, y), min(right, x + w), min(bottom, y + h)
        width, height = inside[2] - inside[0], inside[3] - inside[1]
        if width <= 0 or height <= 0 or width * height <= LEAST_PART_INSIDE * w * h:
            return None
        x, y = inside[0] - left, inside[1] - top
        if flipped:
            x = right - left - x - width
        return x / (right - left), y / (bottom - top), width / (right - left), height / (bottom - top)

    @staticmethod
    def patches(x, y, w, h):
        """1 for [CLS] and for each patch that the box touches, at least one."""
        first_column, first_row = (min(math.floor(v * PATCHES), PATCHES - 1) for v in (x, y))
        end_column = max(first_column + 1, min(math.ceil((x + w) * PATCHES), PATCHES))
        end_row = max(first_row + 1, min(math.ceil((y + h) * PATCHES), PATCHES))
        mask = [1] + [0] * PATCHES**2
        for row in range(first_row, end_row):
            for column in range(first_column, end_column):
                mask[1 + PATCHES * row + column] = 1
        return mask

    def collate(self, samples):
        self.steps.start()
        images = torch.stack([image for image, _ in samples])
        image_of_row = [index for index, (_, rows) in enumerate(samples) for _ in rows]
        rows = [row for _, rows in samples for row in rows]
        if len(rows) >= BATCH:
            kept = random.sample(range(len(rows)), BATCH)
        else:
            kept = [index % len(rows) for index in range(BATCH)]
        batch = [images, torch.tensor([image_of_row[index] for index in kept], dtype=torch.long)]
        for column in zip(*(rows[index] for index in kept)):
            tensors = isinstance(column[0], torch.Tensor)
            batch.append(torch.stack(column) if tensors else torch.tensor(column, dtype=torch.long))
        self.steps.lap("collate")
        return batch


def one_thread(*_):
    """Threads of each of several workers get in one another's way (torch's DataLoader sees to torch's)."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def loader(stream, arguments, steps=None):
    files = sorted(glob.glob(os.path.join(arguments.shards, "*.jsonl")))
    if len(files) < max(arguments.workers, 1):
        sys.exit(f"{arguments.shards}: {len(files)} *.jsonl files for {arguments.workers} workers")
    texts = Texts(os.path.join(arguments.shards, "vocab.txt"))
    kind, group = (ImageText, arguments.batch) if stream == "image-text" else (Region, REGION_IMAGES)
    data = kind(files, arguments.images, group, texts, steps or NoSteps())
    workers = 0 if steps else arguments.workers
    if workers == 0:
        one_thread()
    return DataLoader(
        data,
        batch_size=group,
        num_workers=workers,
        collate_fn=data.collate,
        worker_init_fn=one_thread,
        persistent_workers=workers > 0,
    )


def cpu_seconds():
    """Of this process and its workers, while they live: Linux gives every process a clock of its CPU time, whose
    number is made from its id (linux/posix-timers.h: CPUCLOCK_SCHED is 2)."""
    workers = (time.clock_gettime(~child.pid << 3 | 2) for child in multiprocessing.active_children())
    return time.process_time() + sum(workers)


def one_pass(batches):
    load = os.getloadavg()[0]
    images, cpu, wall = 0, cpu_seconds(), time.perf_counter()
    for batch in batches:
        images += len(batch[0])
        shape = tuple(batch[0].shape[1:])
        if shape != (3, RESOLUTION, RESOLUTION):
            raise ValueError(f"images of {shape}")
    return images, time.perf_counter() - wall, cpu_seconds() - cpu, load


def report(stream, passes, arguments):
    images = passes[0][0]
    wall = statistics.median(seconds for _, seconds, _, _ in passes)
    cpu = statistics.median(seconds for _, _, seconds, _ in passes)
    result = {
        "peer": "torch DataLoader",
        "stream": stream,
        "workers": arguments.workers,
        "images": images,
        "passes": len(passes),
        "seconds": round(wall, 4),
        "cpu_seconds": round(cpu, 4),
        "images_per_second": round(images / wall, 2),
        "images_per_cpu_second": round(images / cpu, 2),
        "cpu_ms_per_image": round(1000 * cpu / images, 4),
        "cores_used": round(cpu / wall, 3),
        "load_before": round(passes[0][3], 2),
    }
    print(json.dumps(result), flush=True)


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "transformers": transformers.__version__,
    }


def profile(stream, arguments):
    steps = Steps()
    batches = loader(stream, arguments, steps)
    one_pass(batches)
    steps.seconds.clear()
    images, wall, cpu, load = one_pass(batches)
    milliseconds = {name: round(1000 * seconds / images, 4) for name, seconds in steps.seconds.items()}
    result = {
        "profile": stream,
        "images": images,
        "ms_per_image": milliseconds,
        "cpu_ms": round(1000 * cpu / images, 4),
        "wall_ms": round(1000 * wall / images, 4),
        "load_before": round(load, 2),
    }
    print(json.dumps(result), flush=True)


def serve(arguments):
    """Both streams' workers wait between passes without using a core."""
    loaders = {stream: loader(stream, arguments) for stream in arguments.streams}
    for batches in loaders.values():
        one_pass(batches)
    print(json.dumps({"ready": list(loaders), "versions": versions()}), flush=True)
    for line in sys.stdin:
        stream = line.strip()
        if stream in loaders:
            report(stream, [one_pass(loaders[stream])], arguments)
        else:
            print(json.dumps({"error": f"no stream {stream!r}"}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder with *.jsonl and vocab.txt, as make_jpegs.py writes them")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=BATCH, help="images in a batch of the image-text stream")
    parser.add_argument("--images", type=int, default=1024, help="images in a pass, made up to whole batches a worker")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--profile", action="store_true")
    mode.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    np.random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    if arguments.serve:
        serve(arguments)
        return
    print(json.dumps({"versions": versions()}), flush=True)
    for stream in arguments.streams:
        if arguments.profile:
            profile(stream, arguments)
            continue
        batches = loader(stream, arguments)
        one_pass(batches)
        report(stream, [one_pass(batches) for _ in range(arguments.passes)], arguments)
        # Its workers end with it.
        del batches


if __name__ == "__main__":
    main()
