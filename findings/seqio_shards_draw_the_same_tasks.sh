#!/usr/bin/env bash
# SeqIO: the shards of a Mixture (get_dataset(shard_info=ShardInfo(i, n), seed=...), one for each host or
# reader) all draw the same tasks in the same order. One seed serves for the order of files, which has to be
# one for all shards, and for sampling tasks. So with two hosts or sixteen, the first example of every one is
# of the same task, and so on: a global batch of short examples is of one task alone, not of the mixture's
# rates, and only over many steps are these what was asked for. Without a seed draws differ, but then
# shards may have the same examples. A sample_fn of one's own, which mixes the shard's number into the seed,
# mends it.
#
# seqio 0.0.20, tensorflow 2.21.0
# Seen: shard 0 of 4: bbbaabbbaabaabbaabbb; shard 1 of 4: the same; shard 2 of 4: the same; shard 3 of 4: the same
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
cd "$here"
python3 -m venv venv
venv/bin/pip install --quiet seqio==0.0.20 tensorflow==2.21.0 tensorflow-text==2.21.1 pytest setuptools
cat > look.py <<'PYTHON'
import seqio
import tensorflow as tf


def task(name):
    """40 examples in eight files of five."""

    def read(file, **_):
        return tf.data.Dataset.from_tensors({"targets": tf.cast([file], tf.int32)}).repeat(5)

    def dataset_fn(split, shuffle_files, seed=None):
        return tf.data.Dataset.range(8).flat_map(read)

    return seqio.TaskRegistry.add(
        name,
        seqio.FunctionDataSource(dataset_fn, splits=["train"]),
        output_features={
            "targets": seqio.Feature(seqio.PassThroughVocabulary(100), add_eos=False)
        },
        preprocessors=[lambda data: data.map(lambda x: {**x, "task": name})],
    )


mixture = seqio.MixtureRegistry.add("both", [(task("a"), 1.0), (task("b"), 1.0)])
first, said = None, []
for shard in range(4):
    rows = mixture.get_dataset(
        split="train",
        seed=0,
        shard_info=seqio.ShardInfo(shard, 4),
        num_epochs=None,
        passthrough_features=["task"],
    )
    drawn = "".join(row["task"].decode() for row in rows.take(20).as_numpy_iterator())
    first = first or drawn
    said.append(f"shard {shard} of 4: {'the same' if shard and drawn == first else drawn}")
print("; ".join(said))
PYTHON
seen="$(venv/bin/python look.py 2> errors)" || { tail -5 errors; exit 1; }
echo "$seen"
[ "$seen" = "shard 0 of 4: bbbaabbbaabaabbaabbb$(printf '; shard %s of 4: the same' 1 2 3)" ]
