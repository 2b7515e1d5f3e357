"""Servers and groups as they are operated: with TLS, and started by torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from ranks import Ranks

import gradwire

HERE = Path(__file__).resolve().parent
#: A CA of these tests, and a certificate of it for 127.0.0.1 and localhost with its key.
CA, CERT, KEY = (str(HERE / "tls" / name) for name in ("ca.crt", "end.crt", "end.key"))


def test_a_client_trusts_servers_of_its_ca_and_tells_what_is_wrong_with_others(monkeypatch):
    monkeypatch.setenv("GRADWIRE_TLS_CERT", CERT)
    monkeypatch.setenv("GRADWIRE_TLS_KEY", KEY)
    monkeypatch.setenv("GRADWIRE_TLS_CLIENT_CA", CA)
    with gradwire.LocalCluster(servers=2) as cluster:
        for name in ("CERT", "KEY", "CLIENT_CA"):
            monkeypatch.delenv(f"GRADWIRE_TLS_{name}")
        with gradwire.connect(cluster.addresses, tls_ca=CA, tls_cert=CERT, tls_key=KEY) as client:
            table = client.dense("w", (1000,))
            table.push(numpy.ones(1000, numpy.float32))
            out = numpy.empty(1000, numpy.float32)
            table.pull(out)
            assert (out == 1).all()
        with pytest.raises(gradwire.TlsError, match="GRADWIRE_TLS_CA") as plain:
            gradwire.connect(cluster.addresses)
        assert plain.value.address == cluster.addresses[0] and "takes only TLS" in plain.value.reason
        with pytest.raises(gradwire.TlsError, match="certificate of ours"):
            gradwire.connect(cluster.addresses, tls_ca=CA)
        # A certificate that is nobody's CA.
        with pytest.raises(gradwire.TlsError, match="not signed by the CA"):
            gradwire.connect(cluster.addresses, tls_ca=CERT, tls_cert=CERT, tls_key=KEY)
        with pytest.raises(ValueError, match="tls-key"):
            gradwire.connect(cluster.addresses, tls_ca=CA, tls_cert=CERT)
        with pytest.raises(TypeError, match="tls_sa"):
            gradwire.connect(cluster.addresses, tls_sa=CA)


def _sum(rank, size, url):
    os.environ |= {f"GRADWIRE_TLS_{name}": value for name, value in (("CERT", CERT), ("KEY", KEY), ("CA", CA))}
    # Ranks call each other by address: this is the name that all of them are certified for.
    os.environ |= {"GRADWIRE_TLS_SERVER_NAME": "localhost", "GRADWIRE_TLS_CLIENT_CA": CA, "GRADWIRE_TRANSPORT": "tcp"}
    with gradwire.Communicator(url, rank=rank, world_size=size) as group:
        values = numpy.full(1_000_000, rank + 1, numpy.float32)
        group.all_reduce(values)
        return float(values.min()), float(values.max())


def test_ranks_of_a_group_sum_over_mutual_tls():
    assert Ranks(3, _sum).results() == [(6.0, 6.0)] * 3


def test_torchrun_starts_workers_and_rank_0_their_servers():
    example = HERE.parent / "examples" / "ps_torchrun.py"
    server = HERE.parents[1] / "target" / "release" / "gradwire-ps"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example]
    ran = subprocess.run([*command, "--server", server], capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stderr
    told = re.search(r"2 workers, 2 servers: held-out accuracy ([\d.]+)%", ran.stdout)
    assert float(told[1]) >= 95
