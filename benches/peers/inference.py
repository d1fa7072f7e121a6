#!/usr/bin/env python3
"""Times X-VLM's inference in PyTorch and ONNX Runtime on the CPU: what a user of the original has.

The base model with random weights: timm's Swin-B, and transformers' BERT-base whose last six layers also attend to patch
tokens (the mean of the patches, then the patches). All of it in evaluation mode, without gradients.

Modes:  eager-f32, eager-bf16 (autocast), compile-f32, compile-bf16 (torch.compile, with weights frozen into the code),
        onnx-f32 (an export, run by ONNX Runtime with all its optimisations).

    inference.py --mode MODE --serve      reads a line of JSON, writes one:
        {"prepare": CASE}                 builds what a case needs, and runs it once to warm up
        "run"                             {"seconds": ...}
        "drop"                            forgets the case
    inference.py --mode MODE --profile CASE
                                          where the time of a case goes, for eager modes

A CASE is {"work": "vision", "resolution": 224, "images": 1, "texts": 0, "tokens": 0}:
    vision      images → patch tokens
    text        texts → states
    fusion      texts, each with an image of its own → states
    grounding   images → tokens, texts → states; each text fused with the one image → boxes. For each text, fusion computes the
                keys and values of the image again, as the original does.
    caption     one image → tokens; a beam search of three beams for twenty tokens after a prompt of four. The original calls
                `generate` of transformers 4.12, which keeps keys and values of the tokens, but computes those of the image, three
                times over, for each token.
    caption-cached
                the same, with the image's keys and values computed once: the best that one can do in a few lines.

A mode that cannot compile or export a case answers {"unsupported": why}; any other error ends it.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertPredictionHeadTransform

from train_step import FUSION_LAYER, hide, mlp, text_config, versions

MODES = ("eager-f32", "eager-bf16", "compile-f32", "compile-bf16", "onnx-f32")
PATCH, VISION_WIDTH = 32, 1024
BEAMS, PROMPT, NEW_TOKENS = 3, 4, 20


class Vision(nn.Module):
    def __init__(self, resolution):
        super().__init__()
        window = resolution // PATCH
        sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "window_size": window}
        self.swin = timm.models.swin_transformer.SwinTransformer(img_size=resolution, num_classes=0, **sizes)

    def forward(self, pixels):
        patches = self.swin.forward_features(pixels).flatten(1, 2)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        config = text_config()
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(FUSION_LAYER))

    def forward(self, ids, mask):
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x, hide(mask))[0]
        return x


class Fusion(nn.Module):
    def __init__(self):
        super().__init__()
        config = text_config(is_decoder=True, add_cross_attention=True)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers - FUSION_LAYER))
        for layer in self.layers:
            attention = layer.crossattention.self
            attention.key, attention.value = (nn.Linear(VISION_WIDTH, config.hidden_size) for _ in range(2))

    def forward(self, text, mask, images):
        image_mask = torch.ones(images.shape[:2])
        for layer in self.layers:
            text = layer(text, hide(mask), encoder_hidden_states=images, encoder_attention_mask=hide(image_mask))[0]
        return text


class Grounding(nn.Module):
    def __init__(self, resolution):
        super().__init__()
        self.vision, self.text, self.fusion = Vision(resolution), Text(), Fusion()
        self.head = mlp(text_config().hidden_size, 4)

    def forward(self, pixels, ids, mask):
        images = self.vision(pixels).expand(len(ids), -1, -1)
        return self.head(self.fusion(self.text(ids, mask), mask, images)[:, 0]).sigmoid()


class Captioning(nn.Module):
    """Causal layers, of which the upper half read the image, and a beam search."""

    def __init__(self, resolution, keep_image_keys):
        super().__init__()
        config = text_config()
        self.heads, self.keep_image_keys = config.num_attention_heads, keep_image_keys
        self.vision, self.text, self.fusion = Vision(resolution), Text(), Fusion()
        self.transform = BertPredictionHeadTransform(config)
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, attention, x, keys, values, is_causal=False):
        query = self.split(attention.self.query(x))
        mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=is_causal)
        return attention.output(mixed.transpose(1, 2).flatten(2), x)

    def image_keys(self, layer, images):
        attention = layer.crossattention.self
        return self.split(attention.key(images)), self.split(attention.value(images))

    def extend(self, ids, images, state):
        first = state["kept"][0][0].shape[2] if state["kept"] else 0
        places = torch.arange(first, first + ids.shape[1])[None]
        x, kept = self.text.embeddings(ids, position_ids=places), []
        for number, layer in enumerate([*self.text.layers, *self.fusion.layers]):
            attention = layer.attention
            keys, values = (self.split(part(x)) for part in (attention.self.key, attention.self.value))
            if state["kept"]:
                keys, values = (torch.cat([old, new], 2) for old, new in zip(state["kept"][number], (keys, values)))
            kept.append((keys, values))
            x = self.attend(attention, x, keys, values, is_causal=first == 0)
            if number >= FUSION_LAYER:
                if self.keep_image_keys:
                    pair = state["image"][number - FUSION_LAYER]
                    keys, values = (part.expand(len(ids), -1, -1, -1) for part in pair)
                else:
                    keys, values = self.image_keys(layer, images)
                x = self.attend(layer.crossattention, x, keys, values)
            x = layer.feed_forward_chunk(x)
        state["kept"] = kept
        return F.linear(self.transform(x[:, -1]), self.text.embeddings.word_embeddings.weight, self.word_bias)

    def forward(self, pixels, ids):
        images = self.vision(pixels)
        state = {"kept": []}
        if self.keep_image_keys:
            state["image"] = [self.image_keys(layer, images) for layer in self.fusion.layers]
        else:
            images = images.expand(BEAMS, -1, -1)
        ids = ids.expand(BEAMS, -1)
        # The beams are equal at first: only the first one counts.
        scores = torch.tensor([0.0] + [-1e9] * (BEAMS - 1))
        new = ids
        for _ in range(NEW_TOKENS):
            logits = F.log_softmax(self.extend(new, images, state).float(), dim=-1)
            words = logits.shape[1]
            scores, best = (scores[:, None] + logits).flatten().topk(2 * BEAMS)
            scores, best = scores[:BEAMS], best[:BEAMS]
            parents, new = best // words, (best % words)[:, None]
            ids = torch.cat([ids[parents], new], dim=1)
            state["kept"] = [tuple(part[parents] for part in pair) for pair in state["kept"]]
        return ids


def build(case):
    """The module of a case and its inputs."""
    work, resolution, tokens = case["work"], case["resolution"], case["tokens"]
    pixels = torch.randn(case["images"], 3, resolution, resolution)
    ids = torch.randint(1000, 30000, (case["texts"], tokens))
    mask = torch.ones(ids.shape)
    if work == "vision":
        return Vision(resolution), (pixels,)
    if work == "text":
        return Text(), (ids, mask)
    if work == "fusion":
        states = torch.randn(*ids.shape, text_config().hidden_size)
        seen = 1 + (resolution // PATCH) ** 2
        return Fusion(), (states, mask, torch.randn(case["images"], seen, VISION_WIDTH))
    if work == "grounding":
        return Grounding(resolution), (pixels, ids, mask)
    if work in ("caption", "caption-cached"):
        return Captioning(resolution, work == "caption-cached"), (pixels, ids[:1, :PROMPT])
    raise ValueError(f"no such work: {work}")


class Unsupported(Exception):
    pass


@contextlib.contextmanager
def compiling():
    """What a compiler or an exporter cannot do is a result, not the end; other errors are."""
    try:
        yield
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise Unsupported(f"{type(error).__name__}: {first}") from error


def onnx_session(module, inputs, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Its threads would go on waiting for work in the time of the others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        torch.onnx.export(module, inputs, path, dynamo=True, external_data=True, optimize=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    named = {put.name: value.numpy() for put, value in zip(session.get_inputs(), inputs)}
    return lambda: session.run(None, named)


class Prepared:
    """A case that is ready to run."""

    def __init__(self, case, mode, threads):
        kind, precision = mode.split("-")
        is_caption = case["work"].startswith("caption")
        if is_caption and kind != "eager":
            raise Unsupported("the search is a loop in Python")
        torch.manual_seed(0)
        module, inputs = build(case)
        # Autocast keeps what it has cast of a weight only for weights that could have gradients, outside inference mode.
        self.autocast = precision == "bf16"
        keeps_casts = kind == "eager" and self.autocast
        module = module.eval().requires_grad_(keeps_casts)
        if kind == "onnx":
            with compiling():
                self.work = onnx_session(module, inputs, threads)
        elif kind == "compile":
            compiled = torch.compile(module, dynamic=False)
            self.work = lambda: compiled(*inputs)
        else:
            self.work = lambda: module(*inputs)
        self.no_gradients = torch.no_grad if keeps_casts or kind == "compile" else torch.inference_mode
        # Code is compiled when it is first run.
        with compiling() if kind == "compile" else contextlib.nullcontext():
            self.run()

    def run(self):
        with self.no_gradients(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            start = time.perf_counter()
            self.work()
            return time.perf_counter() - start


def serve(arguments, out):
    def answer(value):
        print(json.dumps(value), file=out, flush=True)

    def forget():
        torch.compiler.reset()
        gc.collect()

    told = versions()
    told["timm"] = timm.__version__
    if arguments.mode.startswith("onnx"):
        import onnxruntime

        told["onnxruntime"] = onnxruntime.__version__
    answer({"ready": arguments.mode, "versions": told})
    prepared = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question == "run":
                answer({"seconds": prepared.run()})
            elif question == "drop":
                prepared = None
                forget()
                answer({})
            else:
                start = time.perf_counter()
                prepared = Prepared(question["prepare"], arguments.mode, arguments.threads)
                answer({"prepared": time.perf_counter() - start})
        except Unsupported as why:
            answer({"unsupported": str(why)})


def profile(arguments, out):
    prepared = Prepared(json.loads(arguments.profile), arguments.mode, arguments.threads)
    with torch.profiler.profile() as profiler:
        prepared.run()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20), file=out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--threads", type=int, default=2)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--serve", action="store_true")
    what.add_argument("--profile", metavar="CASE")
    arguments = parser.parse_args()
    # Exporters print; answers go alone.
    out, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(arguments.threads)
    if arguments.mode.startswith("compile"):
        from torch._inductor import config

        config.freezing = True
    (serve if arguments.serve else profile)(arguments, out)


if __name__ == "__main__":
    main()
