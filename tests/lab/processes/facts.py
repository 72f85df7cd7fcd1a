"""What a simulated host says of hardware it does not have; a test changes it with ``host.facts(...)``.

Kept as JSON in ``/etc/sparklab/facts.json`` of the host, read there by the commands in ``bin/`` and here by firmware.py.
Defaults are the public facts of a healthy DGX Spark (DGX OS 7.5.0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

PORTS = (("enp1s0f0np0", "enP2p1s0f0np0"), ("enp1s0f1np1", "enP2p1s0f1np1"))  # each QSFP port's two twins
"""Network interfaces of the two QSFP ports, port 0 first; twins of a port are on different PCIe links."""

ROCE = {
    "enp1s0f0np0": "rocep1s0f0",
    "enp1s0f1np1": "rocep1s0f1",
    "enP2p1s0f0np0": "roceP2p1s0f0",
    "enP2p1s0f1np1": "roceP2p1s0f1",
}
"""RoCE device of each ConnectX-7 interface."""

PCI = {
    "enp1s0f0np0": "0000:01:00.0",
    "enp1s0f1np1": "0000:01:00.1",
    "enP2p1s0f0np0": "0002:01:00.0",
    "enP2p1s0f1np1": "0002:01:00.1",
}
"""PCI address of each ConnectX-7 function."""

DGX_RELEASE = """\
DGX_NAME="DGX Spark"
DGX_PRETTY_NAME="NVIDIA DGX Spark"
DGX_SWBUILD_DATE="2025-09-10-13-50-03"
DGX_SWBUILD_VERSION="7.2.3"
DGX_COMMIT_ID="833b4a7"
DGX_PLATFORM="DGX Server for KVM"
DGX_SERIAL_NUMBER="SPARKLAB"

DGX_OTA_VERSION="7.5.0"
DGX_OTA_DATE="Wed Jun 10 05:05:30 PM CEST 2026"
"""

NO_SWAP = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


@dataclass(frozen=True)
class Facts:
    """One host's answers. Fields that name an interface leave the others at their healthy value."""

    gpu_name: str = "NVIDIA GB10"
    driver_version: str = "580.159.03"
    cuda_version: str = "13.0"  # as nvidia-smi prints it
    toolkit_version: str = "13.0.2"  # as /usr/local/cuda/version.json and nvcc print it
    temperature: int = 36  # of the GPU, degrees Celsius
    power: float = 4.2  # drawn by the GPU, W
    utilization: int = 0  # of the GPU, %
    sm_clock: int = 208  # MHz
    max_sm_clock: int = 3003  # MHz
    throttle_reasons: str = "0x0000000000000001"  # bits as in nvml.h; 0x1 is idle
    gpu_processes: tuple[tuple[int, str, int], ...] = ()  # pid, name, MiB
    gpu_columns: Mapping[str, str] = field(default_factory=dict)  # any --query-gpu column, as printed; wins
    nvidia_smi_error: str = ""  # printed instead of any answer, with exit status 18

    vendor: str = "NVIDIA"  # DMI
    product: str = "NVIDIA_DGX_Spark"
    board: str = "P4242"
    bios_version: str = "5.36_0ACUM018"
    dgx_release: str | None = DGX_RELEASE  # /etc/dgx-release; None: there is no such file
    kernel: str | None = None  # /proc/sys/kernel/osrelease; None: this machine's. uname(2) always tells this machine's
    meminfo: Mapping[str, int] = field(
        default_factory=dict
    )  # lines of /proc/meminfo in kB that replace or join the real ones
    swaps: str = NO_SWAP  # /proc/swaps
    dmesg: tuple[str, ...] = (
        "mlx5_core 0000:01:00.0: mlx5_pcie_event:301:(pid 12): Detected insufficient power on the PCIe slot (27W).",
    )

    firmware: str = "28.45.4028"  # of the ConnectX-7
    link_speed: Mapping[str, int] = field(default_factory=dict)  # interface: Mb/s while its carrier is on, else 200000
    pcie_width: Mapping[str, int] = field(default_factory=dict)  # interface: PCIe lanes trained, else 4
    ib_write_bw: Mapping[str, float] = field(
        default_factory=dict
    )  # RoCE device: Gb/s; empty: perftest is not installed

    def speed(self, interface: str) -> int:
        """Mb/s of a ConnectX-7 interface with carrier."""
        return self.link_speed.get(interface, 200_000)

    def files(self) -> dict[str, str | None]:
        """Files of the host that hold a fact, beside those of /sys and /proc (firmware.py); None: there is none."""
        version = json.dumps({"cuda": {"name": "CUDA SDK", "version": self.toolkit_version}}) + "\n"
        return {"/etc/dgx-release": self.dgx_release, "/usr/local/cuda-13.0/version.json": version}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Facts:
        return cls(**json.loads(text))
