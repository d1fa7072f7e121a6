#!/bin/sh
# Usage: setup.sh TARGET_DIR
#
# Makes the virtual environment TARGET_DIR/env with what the scripts here need, from PyPI only.
# PyPI's torch for x86-64 Linux is linked to the CUDA libraries; those without which `import torch` fails are
# installed, the others (cusolver, curand, nvtx, triton, ...) and cuDNN's kernels, which it opens on use, are not.
# Downloads (MB): torch 539, cudnn 519, cublas 405, cufft 218, nccl 216, cusparselt 170, cusparse 151, nvshmem 135,
# nvrtc 47, nvjitlink 47, cupti 12, torchvision 8, cufile 1, cudart 2, all others 190; 4 GB on disk.
# An environment in which torch and torchvision work already (say their smaller CPU wheels) keeps them.
# PYTHON names the interpreter to use (default python3; 3.11 or newer for the versions below).
set -eu
if [ $# -ne 1 ]; then
    echo "usage: $0 TARGET_DIR" >&2
    exit 2
fi
env=$1/env
[ -x "$env/bin/python" ] || "${PYTHON:-python3}" -m venv "$env"
install() {
    "$env/bin/python" -m pip install --quiet --no-cache-dir --no-deps "$@"
}

install numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93 \
    typing_extensions filelock sympy mpmath networkx jinja2 MarkupSafe fsspec \
    transformers==4.57.6 tokenizers==0.22.2 'huggingface-hub<1' \
    regex pyyaml requests urllib3 certifi idna charset-normalizer tqdm packaging safetensors \
    timm==1.0.31 onnxruntime==1.32.0 flatbuffers protobuf \
    onnx==1.23.2 onnxscript==0.7.2 onnx-ir==1.1.0 ml_dtypes

if ! "$env/bin/python" -c 'import torch, torchvision' 2>/dev/null; then
    install torch==2.15.0 torchvision==0.29.2 \
        nvidia-cublas==13.4.1.3 nvidia-cuda-cupti==13.2.86 nvidia-cuda-nvrtc==13.2.86 nvidia-cuda-runtime==13.2.86 \
        nvidia-cudnn-cu13==9.26.0.51 nvidia-cufft==12.2.0.57 nvidia-cufile==1.17.1.22 nvidia-cusparse==12.7.10.12 \
        nvidia-cusparselt-cu13==0.8.1 nvidia-nccl-cu13==2.30.7 nvidia-nvjitlink==13.5.37 nvidia-nvshmem-cu13==3.7.2
    find "$env" -path '*/nvidia/cudnn/lib/libcudnn_*' -delete
fi
"$env/bin/python" -c '
import cv2, numpy, onnxruntime, onnxscript, PIL, timm, torch, torchvision, transformers
for module in cv2, numpy, onnxruntime, onnxscript, PIL, timm, torch, torchvision, transformers:
    print(module.__name__, module.__version__)
'
# By this `cargo xtask` knows that all of the above is there.
cp "$0" "$1/env/setup.sh"
