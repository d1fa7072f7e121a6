#!/usr/bin/env python3
"""Times X-VLM's pre-training step in PyTorch on the CPU: what a user of the original has.

The base model with random weights: transformers' Swin-B and BERT-base, whose last six layers also attend to patch tokens;
dropout 0.1 and stochastic depth 0.1 as in training. A step is forward, backward, clipping to norm 1 and AdamW (fused, in
the four groups of the original: with and without decay, old and new parameters).
Pictures of 224 pixels, texts padded to 40 tokens, of which up to 8 are masked; all random.

Stream image-text: each picture with a text. ITC; ITM of each pair and of two hard negatives for each; MLM.
Stream region: twice as many texts as pictures, each about a box of one; the same losses, and L1 and GIoU of the boxes.

Prints one JSON object a line.

    train_step.py                 --steps timed steps after one to warm up
    train_step.py --serve         as many timed steps as each line read from stdin says, to alternate with another
                                  program's; {"ready": ...} is printed first
"""

import argparse
import json
import os
import platform
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn
from transformers import BertConfig, SwinConfig, SwinModel
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertPredictionHeadTransform

RESOLUTION, PATCH = 224, 32
PATCHES = RESOLUTION // PATCH
MAX_TOKENS, MAX_MASKS = 40, 8
IGNORED = -100
EMBED, TEMPERATURE = 256, 0.07
FUSION_LAYER = 6
STREAMS = ("image-text", "region")
# The original's norm, norm1 and norm2 of Swin are called layernorm here.
NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight", "layernorm.weight", "layernorm_before", "layernorm_after")
# What no published encoder has.
NEW = ("temperature", "project_vision", "project_text", "itm_head", "bbox_head", "crossattention")


def text_config(**more):
    # The rest of the defaults are those of BERT-base; "sdpa" is the fastest attention there is.
    config = BertConfig(**more)
    config._attn_implementation = "sdpa"
    return config


def mlp(width, outputs):
    return nn.Sequential(
        nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs)
    )


def hide(mask):
    """What is added to attention scores, for a mask of ones and zeros."""
    return (1.0 - mask[:, None, None, :]) * -10000.0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        vision = SwinConfig(
            image_size=RESOLUTION, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], drop_path_rate=0.1
        )
        self.vision = SwinModel(vision, add_pooling_layer=False)
        text, fusion = text_config(), text_config(is_decoder=True, add_cross_attention=True)
        width = text.hidden_size
        self.embeddings = BertEmbeddings(text)
        self.text = nn.ModuleList(BertLayer(text) for _ in range(FUSION_LAYER))
        self.fusion = nn.ModuleList(BertLayer(fusion) for _ in range(text.num_hidden_layers - FUSION_LAYER))
        for layer in self.fusion:
            attention = layer.crossattention.self
            attention.key, attention.value = (nn.Linear(vision.hidden_size, width) for _ in range(2))
        self.transform = BertPredictionHeadTransform(text)
        self.word_bias = nn.Parameter(torch.zeros(text.vocab_size))
        self.project_vision, self.project_text = nn.Linear(vision.hidden_size, EMBED), nn.Linear(width, EMBED)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        self.itm_head, self.bbox_head = mlp(width, 2), mlp(width, 4)
        for module in [self.embeddings, self.text, self.fusion, self.transform]:
            module.apply(self.initialise)

    @staticmethod
    def initialise(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def encode_text(self, ids, mask):
        x = self.embeddings(ids)
        for layer in self.text:
            x = layer(x, hide(mask))[0]
        return x

    def fuse(self, text, mask, images, image_mask):
        for layer in self.fusion:
            text = layer(text, hide(mask), encoder_hidden_states=images, encoder_attention_mask=hide(image_mask))[0]
        return text

    def contrast(self, image, text):
        logits = image @ text.t() / self.temperature
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2

    def match(self, images, image_mask, image, texts, text_mask, text):
        with torch.no_grad():
            to_text = F.softmax(image @ text.t() / self.temperature, dim=1) + 1e-5
            to_image = F.softmax(text @ image.t() / self.temperature, dim=1) + 1e-5
            to_text.fill_diagonal_(0)
            to_image.fill_diagonal_(0)
            other_image, other_text = (torch.multinomial(w.float(), 1).flatten() for w in (to_image, to_text))
        positive = self.fuse(texts, text_mask, images, image_mask)[:, 0]
        negative = self.fuse(
            torch.cat([texts, texts[other_text]]),
            torch.cat([text_mask, text_mask[other_text]]),
            torch.cat([images[other_image], images]),
            torch.cat([image_mask[other_image], image_mask]),
        )[:, 0]
        logits = self.itm_head(torch.cat([positive, negative]))
        labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long()
        return F.cross_entropy(logits, labels)

    def fill(self, batch, images, image_mask):
        text = self.encode_text(batch["masked_ids"], batch["mask"])
        fused = self.fuse(text, batch["mask"], images, image_mask)
        places = batch["positions"][:, :, None].expand(-1, -1, fused.shape[2])
        words = self.embeddings.word_embeddings.weight
        logits = F.linear(self.transform(fused.gather(1, places)), words, self.word_bias)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def boxes(self, batch, images, texts):
        fused = self.fuse(texts, batch["mask"], images, torch.ones(images.shape[:2]))[:, 0]
        found, wanted = self.bbox_head(fused).sigmoid().float(), batch["boxes"]
        l1 = F.l1_loss(found, wanted, reduction="none")
        corners = (torchvision.ops.box_convert(boxes, "cxcywh", "xyxy") for boxes in (found, wanted))
        giou = 1 - torch.diag(torchvision.ops.generalized_box_iou(*corners))
        counts = 1.0 - batch["is_image"]
        return (l1 * counts[:, None]).sum() / counts.sum() + (giou * counts).sum() / counts.sum()

    def forward(self, batch):
        patches = self.vision(batch["pixels"]).last_hidden_state
        images = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
        if "index" in batch:
            whole, patches = images[batch["index"]], patches[batch["index"]]
            mask = batch["region_mask"]
            weights = mask[:, 1:, None]
            pooled = (weights * patches).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
            images = torch.cat([pooled, patches], dim=1)
        else:
            mask = torch.ones(images.shape[:2])
        texts = self.encode_text(batch["ids"], batch["mask"])
        image = F.normalize(self.project_vision(images[:, 0]), dim=-1)
        text = F.normalize(self.project_text(texts[:, 0]), dim=-1)
        loss = self.contrast(image, text)
        loss = loss + self.match(images, mask, image, texts, batch["mask"], text)
        loss = loss + self.fill(batch, images, mask)
        if "index" in batch:
            loss = loss + self.boxes(batch, whole, texts)
        return loss


def draw(stream, images):
    rows = images if stream == "image-text" else 2 * images
    lengths = torch.randint(12, MAX_TOKENS + 1, (rows,))
    mask = (torch.arange(MAX_TOKENS) < lengths[:, None]).float()
    ids = torch.randint(1000, 30000, (rows, MAX_TOKENS)) * mask.long()
    masks = (lengths / 4).long().clamp(max=MAX_MASKS)
    is_used = torch.arange(MAX_MASKS) < masks[:, None]
    positions = torch.stack([1 + torch.randperm(11)[:MAX_MASKS] for _ in range(rows)]) * is_used.long()
    batch = {
        "pixels": torch.randn(images, 3, RESOLUTION, RESOLUTION),
        "ids": ids,
        "mask": mask,
        "masked_ids": ids.scatter(1, positions, 103),
        "positions": positions,
        "labels": ids.gather(1, positions).masked_fill(~is_used, IGNORED),
    }
    if stream == "region":
        batch["index"] = torch.arange(rows) // 2
        batch["boxes"] = torch.rand(rows, 4) * 0.4 + 0.3
        batch["is_image"] = (torch.arange(rows) % 2).float()
        covered = (torch.rand(rows, PATCHES**2) < 0.3).float()
        covered[:, 0] = 1
        batch["region_mask"] = torch.cat([torch.ones(rows, 1), covered], dim=1)
    return batch


def peak_memory():
    """Most bytes that the process has ever had in memory."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def groups(model):
    """The parameters by decay and learning rate, as the original's names choose them."""
    by_kind = {}
    for name, parameter in model.named_parameters():
        kind = any(part in name for part in NO_DECAY), any(part in name for part in NEW)
        by_kind.setdefault(kind, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if no_decay else 0.01, "lr": 2e-4 if is_new else 1e-4}
        for (no_decay, is_new), parameters in by_kind.items()
    ]


class Training:
    def __init__(self, arguments):
        self.arguments = arguments
        self.model = Model().train()
        self.optimizer = torch.optim.AdamW(groups(self.model), betas=(0.9, 0.98), eps=1e-8, fused=True)
        self.batch = draw(arguments.stream, arguments.batch)

    def step(self):
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.arguments.precision == "bf16"):
            loss = self.model(self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def steps(self, count):
        cpu, start = time.process_time(), time.perf_counter()
        for _ in range(count):
            loss = self.step()
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu
        result = {"steps": count, "seconds": round(seconds, 4), "cpu_seconds": round(cpu, 4)}
        result.update({"loss": loss, "peak_memory": peak_memory()})
        print(json.dumps(result), flush=True)


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def profile(training):
    with torch.profiler.profile() as profiler:
        training.step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", choices=STREAMS, default="image-text")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--batch", type=int, default=4, help="pictures in a batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--profile", action="store_true", help="where the time of a step goes")
    mode.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    training = Training(arguments)
    training.step()
    count = sum(parameter.numel() for parameter in training.model.parameters())
    print(json.dumps({"ready": count, "versions": versions()}), flush=True)
    if arguments.profile:
        profile(training)
    elif arguments.serve:
        for line in sys.stdin:
            training.steps(int(line))
    else:
        for _ in range(arguments.steps):
            training.steps(1)


if __name__ == "__main__":
    main()
