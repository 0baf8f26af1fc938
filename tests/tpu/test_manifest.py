"""The JobSet for GKE."""

import shlex

import pytest
import yaml
from clouds import WORKDIR

FLAGS = ("--name", "job", *WORKDIR, "--image", "europe-docker.pkg.dev/p/fot/fot:1")


SLICES = [
    *("--topology", "v5e-16", "--gin", "Compute.slices = 2"),
    *("--gin", "MeshShape.replica = 2", "--gin", "MeshShape.fsdp = 4"),
]


def job_set(cloud, *argv):
    return yaml.safe_load(cloud.works("manifest", *argv, *FLAGS))


def test_containers_run_what_workers_run(cloud):
    bindings = ("--gin", "VOCABULARY = \"$(A) 'x' ü: - #😀\"", "--env", "A=$(B)\ntwo: lines")
    more = ("--topology", "v5e-16", "--gin", "MeshShape.fsdp = 4", "--spot")
    made = job_set(cloud, "experiments/long_llama_3b.gin", *bindings, *more)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (slice_,) = made["spec"]["replicatedJobs"]
    assert slice_["replicas"] == 1
    job = slice_["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    # Kubernetes makes one $ of two.
    command = [word.replace("$$", "$") for word in container["command"]]
    assert shlex.join(command[:7]) == "python -m tpu worker --run_dir /tmp/job --"
    assert command[7:] == [
        *("python", "-m", "fot_jax", "train", "experiments/long_llama_3b.gin"),
        "--workdir=gs://bucket/run",
        "--gin=VOCABULARY = \"$(A) 'x' ü: - #😀\"",
        "--gin=MeshShape.fsdp = 4",
    ]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert environment["A"].replace("$$", "$") == "$(B)\ntwo: lines"


def test_one_host(cloud):
    fits = ("--gin", "MeshShape.fsdp = 2")
    made = job_set(cloud, "experiments/long_llama_3b.gin", "--topology", "v6e-8", *fits)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 1
    pod = job["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]


def test_one_host_of_v3_is_of_another_kind_than_many(cloud):
    """ct3-hightpu-4t, which is labelled as a device, and ct3p-hightpu-4t, as a slice."""
    for name, fsdp, label in (("v3-8", 2, "tpu-v3-device"), ("v3-32", 8, "tpu-v3-slice")):
        more = ("--topology", name, "--gin", f"MeshShape.fsdp = {fsdp}")
        made = job_set(cloud, "experiments/long_llama_3b.gin", *more)
        pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label


@pytest.mark.parametrize(
    "more, why",
    [
        (("--topology", "v2-8", "--gin", "MeshShape.fsdp = 2"), "clusters have no nodes of it"),
        (("--name", "A b"), "--name 'A b'"),
        (("--workdir", "relative"), "--workdir 'relative'"),
        (("--workdir", "gs://bucket/run[1]"), "'[' in it: give one without"),
        (SLICES, "Compute.slices = 2: machines of a slice do not know those of others"),
    ],
)
def test_refusals(cloud, more, why):
    code, out, err = cloud.tpu("manifest", "experiments/long_llama_3b.gin", *FLAGS, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert why in err


def test_experiments_from_elsewhere_are_not_in_the_image(cloud):
    code, _, err = cloud.tpu("manifest", cloud.experiment, *FLAGS)
    assert code == 2 and "must be in the repository" in err
