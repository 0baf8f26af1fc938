#!/usr/bin/env bash
# There are two kinds of big-endian .gguf files, and nothing in a file says which it is. GGUFWriter
# with endianess=BIG writes the scales inside quantized blocks, and bfloat16, in little endian as
# they were given; gguf-convert-endian, of the same package, turns them round. GGUFReader says of both
# that their byte order is the other one ("S"), and its data and `dequantize` give, without an error,
# right values for the writer's file alone; of float32 `data` is right in both, while `dequantize`,
# which quantized tensors need, is so in neither. (Float32 is turned round by both.)
#
# gguf 0.19.0, numpy 2.4.6.
# Seen (byte order; largest error of float32 by data, by dequantize, of Q8_0, of bfloat16; "nan or
# huge" above 1e3):
# made little      I 0.0 0.0 0.015 0.008
# made big         S 0.0 nan or huge 0.015 0.008
# converted to big S 0.0 nan or huge nan or huge nan or huge
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv && source venv/bin/activate
pip install --quiet gguf==0.19.0 numpy==2.4.6
cat >test.py <<'EOF'
import shutil
import subprocess

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

np.seterr(all="ignore")
x = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)


def write(path, order):
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    for kind in (Type.F32, Type.Q8_0, Type.BF16):
        writer.add_tensor(kind.name, gguf.quants.quantize(x.copy(), kind).copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def error(values):
    largest = float(np.abs(values - x).max())
    return round(largest, 3) if largest < 1e3 else "nan or huge"


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = [gguf.quants.dequantize(each.data, each.tensor_type) for each in tensors.values()]
    plain = error(tensors["F32"].data.astype(np.float32))
    return [str(reader.byte_order), plain, *map(error, values)]


write("little.gguf", gguf.GGUFEndian.LITTLE)
write("big.gguf", gguf.GGUFEndian.BIG)
shutil.copy("little.gguf", "converted.gguf")
convert = ["gguf-convert-endian", "converted.gguf", "big"]
subprocess.run(convert, input="YES\n", text=True, check=True, capture_output=True)
found = [read(f"{name}.gguf") for name in ("little", "big", "converted")]
for row in found:
    print(*row)
bad = "nan or huge"
assert found == [
    ["I", 0.0, 0.0, 0.015, 0.008],
    ["S", 0.0, bad, 0.015, 0.008],
    ["S", 0.0, bad, bad, bad],
]
EOF
python test.py
