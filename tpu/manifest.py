"""`manifest`: a run as a JobSet of Google Kubernetes Engine."""

from __future__ import annotations

import json
import re
from argparse import Namespace

from fot_jax.common.errors import UserError
from tpu import ship, targets, verbs

_JOB_SET = """\
# {topology}, {hosts} workers. Before: a cluster with JobSet and a node pool with
# --machine-type={machine_type} --tpu-topology={shape} --num-nodes={hosts}.
# The image has the repository as its working directory, with its dependencies installed
# (pip install -e '.[tpu]' -c .ci/constraints.txt). Then: kubectl apply -f FILE
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 20
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {accelerator}
              cloud.google.com/gke-tpu-topology: {quoted_shape}
{spot}            containers:
            - name: worker
              image: {image}
              command:
{command}
              env:
{environment}
              ports:
              - containerPort: 8471
              - containerPort: 8475
              - containerPort: 8476
              resources:
                limits:
                  google.com/tpu: {chips}
"""


def manifest(args: Namespace) -> int:
    """Prints a JobSet whose containers run what `run` starts on workers."""
    print(job_set(args), end="")
    return 0


def job_set(args: Namespace) -> str:
    """The text of the manifest.

    Raises:
      UserError: something that cannot be, or a TPU that clusters do not have.
    """
    targets.check_name(args.name)
    targets.check_workdir(args.workdir)
    targets.check_environment(args.env)
    topology = targets.one_slice_of(args.experiment, args.gin, args.topology).topology
    if topology.chip.accelerator_label is None:
        raise UserError(f"{topology.name}: clusters have no nodes of it: choose another topology")
    code = ship.pack(args.experiment)
    if any(not (ship.REPOSITORY / place).is_file() for place in code.experiments):
        raise UserError("experiment files must be in the repository, which the image holds")
    supervisor = ["python", "-m", "tpu", "worker", "--run_dir", f"/tmp/{args.name}", "--"]
    command = supervisor + ["python", "-m", "fot_jax"] + verbs.training_arguments(code, args)
    environment = []
    for name, value in (each.split("=", 1) for each in ("PYTHONUNBUFFERED=1", *args.env)):
        environment.append(f"              - name: {_quoted(name)}")
        environment.append(f"                value: {_literal(value)}")
    chips = topology.chips // topology.hosts
    kind = topology.chip.machine_type, topology.chip.accelerator_label
    machine_type, label = topology.hosts == 1 and topology.chip.one_host or kind
    spot = " " * 14 + 'cloud.google.com/gke-spot: "true"\n'
    return _JOB_SET.format(
        name=_quoted(args.name),
        image=_quoted(args.image),
        command="\n".join(f"              - {_literal(word)}" for word in command),
        environment="\n".join(environment),
        topology=topology.name,
        hosts=topology.hosts,
        chips=chips,
        shape=topology.shape,
        quoted_shape=_quoted(topology.shape),
        accelerator=_quoted(label),
        machine_type=re.sub(r"\d+t$", f"{chips}t", machine_type),
        spot=spot if args.tier == "spot" else "",
    )


def _quoted(text: str) -> str:
    """As YAML: JSON's strings are YAML's too, and nothing in them is taken for anything else.

    But for characters beyond 16 bits, which JSON writes as two.
    """
    parts = re.split(r"([\U00010000-\U0010ffff])", text)
    inner = (f"\\U{ord(x):08x}" if i % 2 else json.dumps(x)[1:-1] for i, x in enumerate(parts))
    return '"' + "".join(inner).replace("\x7f", "\\u007f") + '"'


def _literal(text: str) -> str:
    """The same where Kubernetes puts variables into the text, $(NAME), unless $ is doubled."""
    return _quoted(text.replace("$", "$$"))
