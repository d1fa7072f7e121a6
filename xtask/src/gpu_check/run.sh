#!/bin/sh
# Runs the tests and the measurements beside this file on the first GPU. Needs the CUDA libraries of a toolkit, or those
# that PyTorch brings, and nothing of Rust.
#
#     sh run.sh [tests | benches]
#
# Logs go to $OUT, or to `out` beside this file. Measurements take the arguments in $BENCH_ARGUMENTS. The exit status is
# 0 if everything passed, 1 if something failed, and 2 if nothing could be run.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
which=${1:-all}
case $which in
all | tests | benches) ;;
*) echo "run.sh: expected tests, benches or nothing, found $which" >&2; exit 2 ;;
esac
out=${OUT:-$here/out}
work=$(mktemp -d) && mkdir -p "$out" || exit 2
trap 'rm -rf "$work"' EXIT

gpu=
for device in /dev/nvidia[0-9]*; do [ -e "$device" ] && gpu=$device; done
if [ -z "$gpu" ]; then
  echo '*** NO GPU: NOTHING WAS RUN ***' >&2
  exit 2
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null

# Every folder with a library of CUDA, wherever it was installed; those of stubs would be linked and do nothing.
folders=$(
  find / \( -path /proc -o -path /sys -o -path /dev -o -name stubs \) -prune -o \
    \( -name 'libcublas*.so*' -o -name 'libcudart.so*' -o -name 'libcurand.so*' -o -name 'libnvrtc.so*' -o \
    -name 'libcuda.so.1' \) -print 2>/dev/null | sed 's|/[^/]*$||' | sort -u
)
LD_LIBRARY_PATH=$(echo "$folders" | tr '\n' ':')${LD_LIBRARY_PATH:-}
# Criterion writes its thousand small files aside; what it prints is in the log.
CRITERION_HOME=$work/criterion
# Tests that find no GPU must not pass by leaving everything out.
XVLM_REQUIRE_GPU=1
export LD_LIBRARY_PATH CRITERION_HOME XVLM_REQUIRE_GPU

failed=0 ran=0
: >"$out/summary.txt"
run() { # name, arguments
  name=$1
  shift
  missing=$(ldd "$here/bin/$name" 2>/dev/null | grep 'not found')
  [ -z "$missing" ] || printf '%s\n' "$name misses libraries:" "$missing"
  begin=$(date +%s)
  # Straight into the log: what ran is kept if time runs out.
  {
    printf '\n== %s\n' "$name"
    cd "$work" && "$here/bin/$name" "$@"
    echo $? >"$work/status"
  } 2>&1 | tee -a "$out/log.txt"
  status=$(cat "$work/status")
  ran=$((ran + 1))
  if [ "$status" -eq 0 ]; then result=passed; else result="FAILED ($status)" failed=$((failed + 1)); fi
  printf '%-40s %5d s  %s\n' "$name" $(($(date +%s) - begin)) "$result" | tee -a "$out/summary.txt"
}

: >"$out/log.txt"
while read -r kind name; do
  case $which:$kind in
  all:test | tests:test) run "$name" ;;
  all:bench | benches:bench)
    # shellcheck disable=SC2086 # several arguments
    run "$name" --bench ${BENCH_ARGUMENTS-}
    ;;
  esac
done <"$here/manifest.txt"

echo
cat "$out/summary.txt"
echo "$((ran - failed)) passed, $failed failed"
[ $ran -gt 0 ] || exit 2
[ $failed -eq 0 ]
