"""A job as a script for elsewhere: under Slurm, or by torchrun. It needs the installed package and the recipe's model and data."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from cluster.errors import RefusedError
from cluster.inventory import is_secret
from launch.recipe import CommandRecipe, FinetuneRecipe, InferenceRecipe

if TYPE_CHECKING:
    from launch.spec import JobSpec
    from launch.start import Prepared

Target = Literal["slurm", "torchrun"]
PORT = 29500
_END = "END_OF_SPEC"
_SHELL = {"node_rank": "$NODE_RANK", "head_addr": "$MASTER_ADDR", "peer_addr": "$PEER_ADDR"}


def script(prepared: Prepared, target: Target, *, version: str) -> str:
    """The script of a fine-tune or of an endpoint: it writes the job's spec into a folder, then starts its ranks."""
    spec = spec_of(prepared, version=version)
    body = _SLURM if target == "slurm" else _TORCHRUN
    paths = [prepared.recipe.base_model]
    if isinstance(prepared.recipe, FinetuneRecipe):
        paths += [dataset.path for dataset in prepared.recipe.datasets]
    return body.format(
        name=prepared.recipe.name,
        world=spec.world_size,
        version=version,
        needs="".join(f"#   {path}\n" for path in paths).rstrip(),
        make_job=_MAKE_JOB.format(name=prepared.recipe.name, end=_END, spec=spec.model_dump_json(indent=1)),
        port=PORT,
    )


def spec_of(prepared: Prepared, *, version: str) -> JobSpec:
    """What the ranks read: as of a job of ours, but for where it runs. Model and data lie where the recipe says."""
    from launch.spec import JobSpec, RankSpec

    wanted = prepared.recipe
    if isinstance(wanted, InferenceRecipe) and wanted.adapter_from is not None:
        raise RefusedError(
            f"{wanted.name}: adapter_from names a job of this pair, which is not known elsewhere",
            "give `adapter_path` the adapter/ folder of the job, as it lies there",
        )
    datasets = tuple(one.path for one in wanted.datasets) if isinstance(wanted, FinetuneRecipe) else ()
    return JobSpec(
        id=wanted.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version,
        recipe=wanted.model_dump(mode="json"),
        layers=prepared.card.layers,
        ranks=tuple(
            RankSpec(
                rank=rank.rank,
                node=f"node-{rank.rank}",
                start=rank.cut.start,
                end=rank.cut.end,
                model=wanted.base_model,
                adapters=dict(prepared.adapters),
                datasets=datasets,
            )
            for rank in prepared.plan.ranks
        ),
        master_addr="127.0.0.1",
        embedded=False,
        strategy=prepared.plan.strategy,
        source=prepared.source,
    )


def command_script(recipe: CommandRecipe, target: Target, *, version: str) -> str:
    """The script of a `kind: command` recipe: each side's argv, with the words of the pair as variables."""
    head, peer = (
        _shell_line(words, recipe) if words else "echo nothing to do here"
        for words in (recipe.command.head, recipe.command.peer)
    )
    variables = "".join(
        f': "${{{name}:?a secret of the recipe, which stands in no file: export it first}}"\n'
        if is_secret(name)
        else f"export {name}={shlex.quote(value)}\n"
        for name, value in recipe.env.items()
    )
    form = _SLURM_COMMAND if target == "slurm" else _TORCHRUN_COMMAND
    return form.format(name=recipe.name, version=version, variables=variables, head=head, peer=peer, port=PORT)


def _shell_line(words: tuple[str, ...], recipe: CommandRecipe) -> str:
    return "exec " + " ".join(_shell_word(word, recipe.model or "") for word in words)


def _shell_word(word: str, model: str) -> str:
    """A word for a shell: placeholders become variables, all else is quoted."""
    pieces = re.split(r"(\{\w+\})", word.replace("{model}", model))
    return (
        "".join(
            f'"{_SHELL[piece[1:-1]]}"' if piece[1:-1] in _SHELL and piece[:1] == "{" else shlex.quote(piece)
            for piece in pieces
            if piece
        )
        or "''"
    )


_MAKE_JOB = """\
job="${{SPARKCTL_JOB:-$PWD/sparkctl-{name}}}"   # the result comes here; every node must see this folder
mkdir -p "$job"
cat > "$job/spec.json" <<'{end}'
{spec}
{end}
"""
_ABOUT = """\
# Written by sparkctl {version} export. Needs the same version of sparkctl-dgx[node] on every node, in $PYTHON (else python3), and
{needs}
# in the same place on every node.
"""
_SLURM = (
    """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={world}
#SBATCH --ntasks={world}
#SBATCH --output=%x-%j.log
# Where nodes have GPUs, one for each task:   sbatch --gpus-per-task=1 THIS_FILE
"""
    + _ABOUT
    + """\
set -eu
{make_job}export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" MASTER_PORT="${{MASTER_PORT:-{port}}}"
export HF_HUB_OFFLINE=1
srun --kill-on-bad-exit=1 bash -c '
  export RANK="$SLURM_PROCID" LOCAL_RANK=0 WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE=1
  [ "$WORLD_SIZE" = {world} ] || {{ echo "this job has {world} ranks, not $WORLD_SIZE" >&2; exit 2; }}
  exec "${{PYTHON:-python3}}" -P -m sparkctl worker "$0"' "$job"
"""
)
_TORCHRUN = (
    """\
#!/bin/sh
# All {world} ranks on one machine:   sh THIS_FILE
# One on each node:   NODES={world} NODE_RANK=0 MASTER_ADDR=192.168.100.10 sh THIS_FILE   (and NODE_RANK=1 on the next)
"""
    + _ABOUT
    + """\
set -eu
{make_job}NODES="${{NODES:-1}}"
export HF_HUB_OFFLINE=1
exec "${{PYTHON:-python3}}" -P -m torch.distributed.run --nnodes "$NODES" --node-rank "${{NODE_RANK:-0}}" \\
  --nproc-per-node "$(({world} / NODES))" --master-addr "${{MASTER_ADDR:-127.0.0.1}}" --master-port "${{MASTER_PORT:-{port}}}" \\
  -m sparkctl worker "$job"
"""
)
_SLURM_COMMAND = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes=2
#SBATCH --ntasks=2
#SBATCH --output=%x-%j.log
# Written by sparkctl {version} export.
set -eu
{variables}export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" MASTER_PORT="${{MASTER_PORT:-{port}}}"
export PEER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)"
script=$(cat <<'END_OF_SIDES'
export NODE_RANK="$SLURM_PROCID"
if [ "$NODE_RANK" = 0 ]; then
  {head}
else
  {peer}
fi
END_OF_SIDES
)
srun --kill-on-bad-exit=1 bash -c "$script"
"""
_TORCHRUN_COMMAND = """\
#!/bin/sh
# On the head:   NODE_RANK=0 MASTER_ADDR=... PEER_ADDR=... sh THIS_FILE   (and NODE_RANK=1 on the peer, with the same addresses)
# Written by sparkctl {version} export.
set -eu
: "${{NODE_RANK:?0 on the head, 1 on the peer}}" "${{MASTER_ADDR:?the head's address on the link}}" "${{PEER_ADDR:?the peer's}}"
export NODE_RANK MASTER_ADDR PEER_ADDR MASTER_PORT="${{MASTER_PORT:-{port}}}"
{variables}if [ "$NODE_RANK" = 0 ]; then
  {head}
else
  {peer}
fi
"""
