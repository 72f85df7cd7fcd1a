"""A simulated host says that it is a DGX Spark, or whatever a test wants it to say."""

from __future__ import annotations

import subprocess

from tests.lab import Host, Lab, eventually


def query(host: Host, columns: str) -> str:
    shown: str = host.run(["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader"]).stdout
    return shown.strip()


def test_a_host_says_that_it_is_a_spark(pair: Lab) -> None:
    host = pair.hosts[0]
    assert query(host, "name,memory.total,driver_version") == "NVIDIA GB10, [N/A], 580.159.03"
    assert query(host, "utilization.gpu,power.draw,temperature.gpu") == "0 %, 4.20 W, 36"
    assert "| N/A   36C    P8" in host.run(["nvidia-smi"]).stdout
    assert b'DGX_NAME="DGX Spark"' in host.read("/etc/dgx-release")
    assert host.read("/sys/class/dmi/id/product_name") == b"NVIDIA_DGX_Spark\n"
    assert "rocep1s0f0 port 1 ==> enp1s0f0np0 (Up)" in host.run(["ibdev2netdev"]).stdout
    assert "rocep1s0f1 port 1 ==> enp1s0f1np1 (Down)" in host.run(["ibdev2netdev"]).stdout
    assert "Rate: 200\n" in host.run(["ibstat", "rocep1s0f0"]).stdout
    assert host.run(["lspci", "-vv"]).stdout.count("Speed 32GT/s, Width x4\n") == 4
    assert "V13.0.2" in host.run(["/usr/local/cuda/bin/nvcc", "--version"]).stdout
    assert host.run(["sh", "-c", "command -v nvcc"], check=False).returncode


def test_facts_of_the_gpu_change_on_one_host_only(pair: Lab) -> None:
    host, other = pair.hosts
    healthy = host.facts()
    host.facts(
        driver_version="570.1",
        sm_clock=507,
        gpu_columns={"temperature.gpu": "85"},
        gpu_processes=((42, "vllm", 96073),),
    )
    assert query(host, "driver_version,clocks.sm,temperature.gpu") == "570.1, 507 MHz, 85"
    apps = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    assert host.run(apps).stdout == "42, vllm, 96073\n"
    assert query(other, "driver_version") == "580.159.03"
    host.facts(nvidia_smi_error="Failed to initialize NVML: Driver/library version mismatch")
    assert host.run(["nvidia-smi"], check=False).returncode == 18
    host.facts(**vars(healthy))
    assert query(host, "driver_version") == "580.159.03"


def test_facts_of_the_box_change(pair: Lab) -> None:
    host = pair.hosts[0]
    healthy = host.facts()
    host.facts(
        dgx_release=None, vendor="ASUS", kernel="7.0.0-1019-nvidia", dmesg=("mlx5 is unhappy",), meminfo={"CmaTotal": 0}
    )
    assert host.run(["test", "-e", "/etc/dgx-release"], check=False).returncode
    assert host.read("/sys/class/dmi/id/sys_vendor") == b"ASUS\n"
    assert host.read("/proc/sys/kernel/osrelease") == b"7.0.0-1019-nvidia\n"
    assert "mlx5 is unhappy" in host.run(["dmesg"]).stdout
    assert [text.split() for text in host.read("/proc/meminfo").decode().splitlines() if "Cma" in text] == [
        ["CmaTotal:", "0", "kB"]
    ]
    host.facts(**vars(healthy))
    assert host.run(["test", "-e", "/etc/dgx-release"]).returncode == 0


def test_facts_of_the_link_change(pair: Lab) -> None:
    host = pair.hosts[0]
    healthy = host.facts()
    host.facts(link_speed={"enp1s0f0np0": 100_000}, pcie_width={"enp1s0f0np0": 2}, firmware="28.1")
    assert host.read("/sys/class/net/enp1s0f0np0/speed") == b"100000\n"
    assert host.read("/sys/class/net/enP2p1s0f0np0/speed") == b"200000\n"
    assert "Speed: 100000Mb/s" in host.run(["ethtool", "enp1s0f0np0"]).stdout
    assert "firmware-version: 28.1" in host.run(["ethtool", "-i", "enp1s0f0np0"]).stdout
    assert "Rate: 100\n" in host.run(["ibstat", "rocep1s0f0"]).stdout
    assert "Width x2 (downgraded)" in host.run(["lspci", "-vv", "-s", "01:00.0"]).stdout
    host.facts(**vars(healthy))


def test_ib_write_bw_meets_its_peer_and_tells_the_fact(simple: Lab) -> None:
    head, peer = simple.hosts
    assert head.run(["sh", "-c", "command -v ib_write_bw"], check=False).returncode
    for host, device in ((head, "rocep1s0f0"), (peer, "rocep1s0f1")):
        host.facts(ib_write_bw={device: 97.28})
    server = peer.start(["ib_write_bw", "-d", "rocep1s0f1", "--report_gbits"], stdout=subprocess.PIPE, text=True)
    client = ["ib_write_bw", "-d", "rocep1s0f0", "--report_gbits", "10.0.0.2"]
    eventually(lambda: head.run(client, check=False).returncode == 0)
    assert " 97.28 " in server.communicate(timeout=5)[0]
    for host in simple.hosts:
        host.facts(ib_write_bw={})
