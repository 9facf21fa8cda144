"""Disks that are full, lose power, change bytes; weights that are damaged or replaced while they are read."""

from __future__ import annotations

from pathlib import Path

from tests.faults import bit_rot, mutate_weights, power_loss, reload_soak
from tests.faults.disk_log import LOSSES
from tests.faults.own_mounts import run_with_mounts
from tests.faults.row import Measured, row


@row(
    "F8",
    did="the disk filled while models are fetched and trained, files sent and jobs created, 10 times each",
    expected="507 disk_full, jobs failed: disk_full; 0 partial visible, 0 leaked temps, no restart; texts go on",
    minutes=12,
    needs="root",
)
def full_disk(folder: Path, share: float) -> Measured:
    figures = run_with_mounts("tests.faults.full_disk", str(folder), str(share))
    return Measured(
        f"{len(figures['wrong'])} of {figures['checks']} answers other than that; {len(figures['partial'])} partial, "
        f"{len(figures['left'])} left behind; {figures['failed']} of {figures['requests']:,} texts failed",
        not any(figures[name] for name in ("wrong", "partial", "left", "failed")),
        figures,
    )


@row(
    "F9",
    did="power lost at 1,000 moments of publishing, fetching, deleting, uploading and creating jobs; what was not "
    f"synced is lost in {len(LOSSES)} ways each",
    expected="all that was acknowledged is there and hashes right, nothing partial is visible",
    minutes=20,
)
def power_lost(folder: Path, share: float) -> Measured:
    figures = power_loss.run(max(10, round(1000 * share)), 0, folder)
    return Measured(
        f"{figures['broken']} of {figures['promises']:,} promises broken, in {figures['states']:,} states after "
        f"{figures['cuts']:,} cuts of {figures['calls']:,} calls; {figures['revisions_read']:,} revisions read whole",
        not figures["broken"] and figures["promises"] > 0,
        figures,
    )


@row(
    "F10",
    did="10,000 weight files truncated, flipped, rewritten or made of hostile pickles, each taken to an engine",
    expected="0 crashes, 0 wrong loads, no pickle run",
    minutes=25,
)
def mutated(folder: Path, share: float) -> Measured:
    figures = mutate_weights.run(max(20, round(10_000 * share)), 0)
    return Measured(
        f"{figures['crashes']} crashes, {figures['wrong_loads']} wrong loads, {figures['pickle_ran']} pickles run; "
        f"{figures['refused']:,} of {figures['mutations']:,} refused",
        not any(figures[name] for name in ("crashes", "wrong_loads", "pickle_ran")) and figures["mutations"] > 0,
        figures,
    )


@row(
    "F11",
    did="an hour of models that do not all fit, each replaced by a new version and the old one removed, over and over",
    expected="0 generators die, 0 texts fail",
    minutes=62,
)
def replaced(folder: Path, share: float) -> Measured:
    figures = reload_soak.run(max(0.5, 60 * share), folder)
    return Measured(
        f"{figures['died']} died, {figures['failed']} of {figures['requests']:,} texts failed; {figures['loads']:,} "
        f"loads, {figures['published']:,} versions in {figures['minutes']:.0f} min",
        figures["died"] == figures["failed"] == 0 < figures["loads"],
        figures,
    )


@row(
    "F27",
    did=f"a bit flipped in the weights of a model, 20 times; a round takes {bit_rot.ROUND_S:.0f} s, not 20 h",
    expected="found within a round, and not served; what is from the Hub is fetched again, other models go on",
    minutes=14,
)
def rotten(folder: Path, share: float) -> Measured:
    figures = bit_rot.run(max(2, round(20 * share)), folder)
    terabytes = 20 * 3600 * figures["bytes_per_s"] / 1e12
    return Measured(
        f"{figures['found']} of {figures['flips']} found, after {figures['longest_s']:.0f} s at most; "
        f"{len(figures['wrong'])} served wrongly then, {len(figures['others_hurt'])} others hurt; at "
        f"{figures['bytes_per_s'] / 1e6:.0f} MB/s, 20 h read {terabytes:.0f} TB",
        figures["found"] == figures["flips"] and not figures["wrong"] and not figures["others_hurt"],
        figures,
    )
