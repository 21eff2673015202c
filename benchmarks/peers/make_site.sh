#!/usr/bin/env bash
# Build ONE trimmed archive with the peer fine-tuning tools (TRL + PEFT +
# bitsandbytes, Liger kernels, Unsloth) for a GPU machine without network.
#
#   ./make_site.sh OUT.tar.xz
#
# Needs: bash, python3 with pip, tar, xz, strip (binutils), and a network.
# Nothing is installed here: the wheels are downloaded for CPython 3.12 on
# Linux x86-64, unpacked into a temporary folder, trimmed and packed.
#
#   SLIM=1       leave out pyarrow, pandas, xxhash and einops, for a machine that
#                has them (a quarter of the size; see README.md beside this)
#   PANDAS=real  carry the real pandas instead of the stub (about 6 MB more)
#   PYTHON=...   another python3 to call pip with
#   KEEP=DIR     build in DIR and leave it there (wheels in DIR/whl are reused)
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 OUT.tar.xz" >&2
  exit 2
fi
out=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
py=${PYTHON:-python3}
pandas=${PANDAS:-stub}
for tool in tar xz strip "$py"; do
  command -v "$tool" >/dev/null || { echo "$0: $tool is missing" >&2; exit 1; }
done
if [ -n "${KEEP:-}" ]; then
  mkdir -p "$KEEP"; work=$(cd "$KEEP" && pwd)
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
whl=$work/whl site=$work/site
rm -rf "$site"; mkdir -p "$whl" "$site"

# The versions belong together: unsloth 2026.10.9 allows trl <= 1.15.0,
# transformers <= 5.17.0 and datasets < 5; datasets 4.8.5 allows
# dill < 0.4.2, multiprocess < 0.70.20 and fsspec <= 2026.2.0.
packages=(
  trl==1.15.0
  peft==0.21.2
  bitsandbytes==0.50.2
  liger-kernel==0.8.5
  unsloth==2026.10.9
  unsloth_zoo==2026.10.9
  cut_cross_entropy==25.1.1
  torchao==0.18.0
  einops==0.8.2
  datasets==4.8.5
  pyarrow==26.0.1
  dill==0.4.1
  multiprocess==0.70.19
  xxhash==4.1.0
  fsspec==2026.2.0
  nest-asyncio==1.6.0
)
if [ "$pandas" = real ]; then
  packages+=(pandas==3.1.1 python-dateutil==2.9.0.post0 six==1.17.0)
fi

if [ "${SLIM:-0}" = 1 ]; then
  pandas=none
  slim=()
  for p in "${packages[@]}"; do
    case ${p%%==*} in pyarrow|pandas|python-dateutil|six|xxhash|einops) ;; *) slim+=("$p") ;; esac
  done
  packages=("${slim[@]}")
fi

platforms=()
for p in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 \
         manylinux2014 manylinux1; do
  platforms+=(--platform "${p}_x86_64")
done
for p in "${packages[@]}"; do
  name=${p%%==*} version=${p##*==}
  # a wheel's file name has _ where the project's name has -
  if compgen -G "$whl/${name//-/_}-$version-*.whl" >/dev/null; then continue; fi
  echo "download $p"
  "$py" -m pip download -q --no-deps --only-binary=:all: \
    --disable-pip-version-check \
    --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d "$whl" "$p" 2> >(grep -v '^WARNING: Location' >&2)
done

WHL=$whl SITE=$site PACKAGES="${packages[*]}" PANDAS=$pandas "$py" - <<'PY'
"""Unpack the wheels into the site folder, leaving out what training never imports."""
import fnmatch, glob, os, re, zipfile

whl, site = os.environ["WHL"], os.environ["SITE"]

# Left out of every wheel.
COMMON = ["*/tests/*", "*/test/*", "*/testing_data/*", "*/benchmarks/*", "*.pyx", "*.pxd", "*.pxi",
          "*.pyi", "*.h", "*.hpp", "*.cpp", "*.cc", "*.cu", "*.cuh", "*.a", "*.lib", "*.dll",
          "*.dylib", "*.exe", "*/__pycache__/*", "*.dist-info/sboms/*"]
# Left out of one wheel; "!" keeps.
DROP = {
    # one CUDA 13.0 library out of sixteen, and the CPU one
    "bitsandbytes": ["*.so", "!*libbitsandbytes_cuda130.so", "!*libbitsandbytes_cpu.so"],
    # the web studio and the command line: most of the wheel
    "unsloth": ["studio/*", "unsloth_cli/*", "*.data/*"],
    # its extensions are optional; without them torchao says so once and goes on in Python
    "torchao": ["*.so"],
    # cloud file systems, Flight, ORC, tests. libarrow_substrait must stay: the others link to it.
    "pyarrow": ["pyarrow/include/*", "pyarrow/includes/*", "pyarrow/src/*",
                "*flight*", "*libarrow_s3.so*", "*_s3fs.*", "*_gcsfs.*", "*_azurefs.*", "*_hdfs.*",
                "*_orc.*", "*dataset_orc*", "*_substrait.*.so", "*parquet_encryption*", "*_cuda.*",
                "*gandiva*", "*_pyarrow_cpp_tests*", "*libarrow_python.so", "*libarrow_python.so.*.*",
                "*/conftest.py", "*/benchmark.py", "*/cuda.py", "*/jvm.py", "*/orc.py"],
    "pandas": [],
}


def dropped(path, rules):
    out = any(fnmatch.fnmatch(path, r) for r in COMMON)
    for r in rules:
        if r.startswith("!"):
            if fnmatch.fnmatch(path, r[1:]):
                out = False
        elif fnmatch.fnmatch(path, r):
            out = True
    # what importlib.metadata reads stays whole
    if ".dist-info/" in path and "/sboms/" not in path:
        out = False
    return out


for spec in os.environ["PACKAGES"].split():
    name, version = spec.split("==")
    files = glob.glob(os.path.join(whl, f"{name.replace('-', '_')}-{version}-*.whl"))
    if len(files) != 1:
        raise SystemExit(f"{spec}: expected one wheel, found {files}")
    n = size = 0
    with zipfile.ZipFile(files[0]) as z:
        for info in z.infolist():
            path = info.filename
            if info.is_dir() or dropped(path, DROP.get(name, [])):
                continue
            to = os.path.join(site, path)
            os.makedirs(os.path.dirname(to), exist_ok=True)
            with open(to, "wb") as f:
                f.write(z.read(info))
            n, size = n + 1, size + info.file_size
    print(f"{spec}: {n} files, {size / 2**20:.1f} MiB")

if os.environ["PANDAS"] == "stub":
    # datasets and trl import pandas for type checks and for to_pandas()-like
    # calls, which supervised fine-tuning never makes. The version below 1.0
    # makes pyarrow leave its own pandas integration off.
    d = os.path.join(site, "pandas")
    os.makedirs(os.path.join(d, "api"))
    with open(os.path.join(d, "__init__.py"), "w") as f:
        f.write('''"""A stand-in for pandas: names to check types against, no behaviour."""
__version__ = "0.0.0"


class _Absent:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("this site carries a stub of pandas (see the README beside make_site.sh)")


class DataFrame(_Absent):
    pass


class Series(_Absent):
    pass


class Index(_Absent):
    pass


class Categorical(_Absent):
    pass


class Timestamp(_Absent):
    pass


class Timedelta(_Absent):
    pass


from . import api  # noqa: E402,F401
''')
    with open(os.path.join(d, "api", "__init__.py"), "w") as f:
        f.write("from . import extensions, types  # noqa: F401\n")
    with open(os.path.join(d, "api", "extensions.py"), "w") as f:
        f.write("class ExtensionArray:\n    pass\n\n\nclass ExtensionDtype:\n    pass\n")
    with open(os.path.join(d, "api", "types.py"), "w") as f:
        f.write("def is_list_like(x):\n    return hasattr(x, '__iter__') and not isinstance(x, (str, bytes))\n")
    m = os.path.join(site, "pandas-0.0.0.dist-info")
    os.makedirs(m)
    with open(os.path.join(m, "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\nName: pandas\nVersion: 0.0.0\nSummary: stub\n")
    with open(os.path.join(m, "top_level.txt"), "w") as f:
        f.write("pandas\n")
    with open(os.path.join(m, "RECORD"), "w") as f:
        f.write("pandas/__init__.py,,\n")
PY

find "$site" -type f \( -name '*.so' -o -name '*.so.*' \) -exec strip -s {} +

# The x86 filter makes machine code about a tenth smaller; tar -xJf undoes it.
rm -f "$out"
XZ_OPT='-T1 --x86 --lzma2=preset=6,dict=32MiB' tar --sort=name --owner=0 --group=0 \
  --mtime='2026-01-01 00:00:00Z' -C "$site" -cJf "$out" .
echo "site: $(du -sm "$site" | cut -f1) MB unpacked, $(du -k "$out" | cut -f1) KB packed: $out"
