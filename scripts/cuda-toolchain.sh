#!/usr/bin/env bash
# Puts a CUDA compiler, and libraries to link with, under FOLDER on a machine that has neither a GPU nor the CUDA
# toolkit, so that `cargo build --features cuda` compiles and links there, and `cargo xtask kernels-check` works.
#
#     scripts/cuda-toolchain.sh FOLDER && . FOLDER/env.sh
#
# The compiler is NVIDIA's own, from their Python packages (110 MB to fetch, 300 MB on disk). The libraries of the driver,
# cuBLAS, cuRAND and NVRTC are stubs: they have the real names and every symbol, and do nothing. A program linked with them
# finds the real ones when it is started on a machine with a GPU. A second run takes a moment and changes nothing.
set -euo pipefail

# A compiler newer than a driver emits PTX that the driver refuses: raise these together, and bless the table of
# `cargo xtask kernels-check` afterwards.
cuda_version=13000 # as cudarc spells 13.0
packages=(
  nvidia-cuda-nvcc==13.0.88
  nvidia-cuda-crt==13.0.88
  nvidia-nvvm==13.0.88
  nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85
)
# Library, soname, prefix of its functions, module of cudarc that declares them.
libraries=(
  'cuda libcuda.so.1 cu driver'
  'nvrtc libnvrtc.so.13 nvrtc nvrtc'
  'curand libcurand.so.10 curand curand'
  'cublas libcublas.so.13 cublas cublas'
  'cublasLt libcublasLt.so.13 cublasLt cublaslt'
  'cudnn libcudnn.so.9 cudnn cudnn'
  'nccl libnccl.so.2 nccl nccl'
)

fail() {
  printf 'cuda-toolchain.sh: %s\n' "$1" >&2
  exit 1
}
need() { command -v "$1" >/dev/null || fail "needs $1 ($2)"; }

[ $# -eq 1 ] || fail 'expected one argument, the folder to fill'
project=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
[ "$(uname -sm)" = 'Linux x86_64' ] || fail "knows the packages of Linux x86_64, found $(uname -sm)"
need cargo 'the Rust toolchain'
need python3 'Debian: python3 and python3-pip'
need g++ 'the C++ compiler that nvcc works with; Debian: g++'
python3 -m pip --version >/dev/null 2>&1 || fail 'needs pip (Debian: python3-pip)'

# One run at a time. What is unfinished lies aside, and goes with the run that made it or with the next one.
exec 9>"$folder/.lock"
flock 9
rm -rf "$folder"/.aside.*
aside=$(mktemp -d "$folder/.aside.XXXXXX")
trap 'rm -rf "$aside"' EXIT

# Puts the folder aside/NAME in the place of folder/NAME.
install_folder() {
  if [ -e "$folder/$1" ]; then mv "$folder/$1" "$aside/$1.old"; fi
  mv "$aside/$1" "$folder/$1"
}

# pip leaves a folder NAME-VERSION.dist-info for each package.
has_packages() {
  local package name
  for package in "${packages[@]}"; do
    name=${package%%==*}
    [ -d "$folder/toolkit/${name//-/_}-${package##*==}.dist-info" ] || return 1
  done
}
if ! has_packages; then
  echo "fetching ${packages[*]}"
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
    --target "$aside/toolkit" "${packages[@]}" || fail 'pip could not install the compiler'
  ln -s libcudart.so.13 "$aside/toolkit/nvidia/cu13/lib/libcudart.so"
  install_folder toolkit
fi
home=$folder/toolkit/nvidia/cu13
nvcc_version=$("$home/bin/nvcc" --version | tail -n 1) || fail "$home/bin/nvcc does not run"

# The sources of the cudarc that this project is locked to.
manifest=$(
  cd "$project"
  cargo metadata --locked --format-version 1 --features xvlm/cuda | python3 -c '
import json, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "cudarc":
        print(package["manifest_path"])'
) || fail 'cargo metadata did not find the sources of cudarc'
cudarc=$(dirname "$manifest")
[ -d "$cudarc/src/driver/sys" ] || fail "expected the declarations of CUDA in $cudarc/src, found none"

made_from="$(basename "$cudarc") ${libraries[*]}"
if [ "$(cat "$folder/stubs/made-from" 2>/dev/null)" != "$made_from" ]; then
  mkdir "$aside/stubs"
  for library in "${libraries[@]}"; do
    read -r name soname prefix module <<<"$library"
    source="$aside/$name.c"
    sed -nE "s/.*pub unsafe fn (${prefix}[A-Za-z0-9_]*).*/void \1(void) {}/p" "$cudarc/src/$module/sys/mod.rs" |
      sort -u >"$source"
    [ -s "$source" ] || fail "found no function $prefix… in $cudarc/src/$module/sys/mod.rs"
    g++ -x c -shared -fPIC -w -fno-builtin -Wl,-soname,"$soname" -o "$aside/stubs/lib$name.so" "$source"
  done
  printf '%s\n' "$made_from" >"$aside/stubs/made-from"
  install_folder stubs
fi

# 90 is Hopper: candle compiles its kernels for one architecture, and asks the GPU where none is given.
cat >"$aside/env.sh" <<ENV
export CUDA_HOME='$home'
export PATH='$home/bin':"\$PATH"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}"
export CUDARC_CUDA_VERSION=$cuda_version
export LIBRARY_PATH='$folder/stubs:$home/lib'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
ENV
cmp -s "$aside/env.sh" "$folder/env.sh" || mv "$aside/env.sh" "$folder/env.sh"
printf '%s\nready: source %s/env.sh\n' "$nvcc_version" "$folder"
