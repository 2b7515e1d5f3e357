"""Checkpoints in a bucket: a server that speaks S3 as a process of its own, and Amazon's own client to look into it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import boto3
import numpy
import pytest
import safetensors.numpy

import gradwire
from test_ps_checkpoints import BINARY, Servers, run, train

BUCKET = "training"
S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def bucket():
    """An empty bucket, and the environment by which everybody finds it."""
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-c", S3], stdin=pipe, stdout=pipe, stderr=quiet, text=True)
    address = f"http://127.0.0.1:{int(process.stdout.readline())}"
    said = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in said.items():
            patch.setenv(name, value)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        yield client
    process.communicate()


def keys(bucket, prefix):
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [one["Key"] for page in pages for one in page.get("Contents", [])]


def test_servers_go_on_from_a_bucket_at_any_number_of_shards(bucket):
    place = f"s3://{BUCKET}/runs/one"
    with gradwire.LocalCluster(servers=2) as cluster:
        expected = train(cluster.addresses, 5)
    with Servers(2, "--checkpoint-dir", place, "--checkpoint-keep", "2") as servers:
        names = [train(servers.addresses, clock, lambda client: client.snapshot())[2].name for clock in (1, 2, 3)]
    # The oldest is gone, as in a folder, and nothing lies beside the prefix.
    assert {key.split("/")[2] for key in keys(bucket, "")} == set(names[1:])
    assert all(key.startswith("runs/one/") for key in keys(bucket, ""))
    with Servers(3, "--checkpoint-dir", place, "--restore", "latest") as servers:
        got = train(servers.addresses, 5)
    assert all(numpy.array_equal(one, other) for one, other in zip(got[:2], expected[:2]))


def test_what_lacks_a_manifest_is_never_taken_for_a_checkpoint(bucket):
    place = f"s3://{BUCKET}/half"
    with Servers(2, "--checkpoint-dir", place) as servers:
        *_, whole = train(servers.addresses, 2, lambda client: client.snapshot())
        *_, later = train(servers.addresses, 3, lambda client: client.snapshot())
    manifests = [key for key in keys(bucket, f"half/{later.name}") if "manifest" in key]
    assert len(manifests) == 2
    bucket.delete_object(Bucket=BUCKET, Key=manifests[1])
    with Servers(1, "--checkpoint-dir", place, "--restore", "latest") as servers:
        with gradwire.connect(servers.addresses, rank=0) as client:
            assert client.dense("w", 30_000, rule=gradwire.Adam(lr=0.01), workers=2).clock == whole.clocks["w"] == 2
    refused = subprocess.run(
        [BINARY, "serve", "--checkpoint-dir", place, "--restore", later.name], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0 and "not whole" in refused.stderr


def test_a_server_killed_while_it_uploads_leaves_the_checkpoint_before(bucket):
    place, elements = f"s3://{BUCKET}/killed", 12_000_000
    values = numpy.arange(elements, dtype=numpy.float32)
    with Servers(1, "--checkpoint-dir", place) as servers:
        with gradwire.connect(servers.addresses, rank=0) as client:
            table = client.dense("large", elements, workers=1)
            table.push(values)
            client.snapshot()
            table.push(values)
        uploads = lambda: bucket.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])  # noqa: E731
        assert not uploads()

        def ask():
            with gradwire.connect(servers.addresses, rank=1, reconnect_s=0.2) as other, pytest.raises(gradwire.GradwireError):
                other.snapshot()

        asked = threading.Thread(target=ask)
        asked.start()
        deadline = time.monotonic() + 30
        while not any(one["Key"].startswith("killed/") for one in uploads()):
            assert time.monotonic() < deadline, "no upload was seen"
            time.sleep(0.005)
        servers.kill()
        asked.join()
    with Servers(2, "--checkpoint-dir", place, "--restore", "latest") as servers:
        with gradwire.connect(servers.addresses, rank=0) as client:
            table = client.dense("large", elements, workers=1)
            assert table.clock == 1
            assert numpy.array_equal(table.pull(), values)
    assert len([key for key in keys(bucket, "killed/") if "manifest" in key]) == 1


def test_export_and_import_take_addresses(bucket, tmp_path):
    place, file = f"s3://{BUCKET}/exported", tmp_path / "model.safetensors"
    with Servers(2, "--checkpoint-dir", place) as servers:
        dense, _, written = train(servers.addresses, 2, lambda client: client.snapshot())
    for address in (place, f"{place}/{written.name}"):
        assert run("export", address, file)["name"] == written.name
        assert numpy.array_equal(safetensors.numpy.load_file(file)["w"], dense)
    made = run("import", file, f"s3://{BUCKET}/imported")
    assert {key.split("/")[1] for key in keys(bucket, "imported/")} == {made["name"]}


@pytest.mark.parametrize(
    ("place", "changed", "reason"),
    [
        ("s3://no-such-bucket/run", {}, "NoSuchBucket"),
        (f"s3://{BUCKET}/run", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "AWS_ENDPOINT_URL"),
        (f"gs://{BUCKET}/run", {}, "gs:// is not known"),
    ],
)
def test_a_bucket_that_cannot_be_had_is_told_at_the_start(bucket, place, changed, reason):
    began = time.monotonic()
    refused = subprocess.run(
        [BINARY, "serve", "--checkpoint-dir", place], capture_output=True, text=True, timeout=60, env=os.environ | changed
    )
    assert refused.returncode != 0 and place in refused.stderr and reason in refused.stderr, refused.stderr
    assert time.monotonic() - began < 30
