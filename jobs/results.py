"""Held-out results before and after PPO, computed from the files that the run wrote."""

from actors.coordinator import read_evaluation
from cluster.run_directory import RunDirectory, append_json
from llama2.evaluation import Judged, improvement, summary, win_rate

NOTE = (
    "Before is the policy that PPO started from, after is its result; both answered the same "
    "held-out prompts with the same random seeds."
)
ROWS = {
    "gold": "gold score (0 to 1)",
    "reward": "reward (composite, before whitening)",
    "kl": "KL from the initial policy (nats per answer)",
    "violations": "violation rate",
    "false_refusals": "false-refusal rate",
    "tokens": "answer length (tokens)",
}


def write(run: RunDirectory, iterations: int) -> None:
    """Put the table and sample answers into the run's summary and samples."""
    before, after = read_evaluation(run, 0), read_evaluation(run, iterations)
    first, last = summary(before), summary(after)
    table = [
        {"": title, "before": first[name], "after": last[name]}
        for name, title in ROWS.items()
        if name in first
    ]
    wins, gain = win_rate(before, after), improvement(before, after)
    measure = "gold score" if before[0].gold is not None else "reward"
    table += [
        {
            "": f"win rate against the start (by {measure}, a tie is half)",
            "before": 0.5,
            "after": wins.mean,
        }
    ]
    for path in (run.samples,):
        path.unlink(missing_ok=True)
    for a, b in _examples(before, after):
        append_json(
            run.samples,
            {"step": iterations, "prompt": a.prompt, "before": a.answer, "after": b.answer}
            | ({} if a.gold is None else {"gold before": a.gold, "gold after": b.gold}),
        )
    run.finish(
        {
            "Held-out results": table,
            "prompts": len(before),
            "gain": gain.mean,
            "gain_standard_error": gain.error,
            "win_rate_standard_error": wins.error,
            "before": first,
            "after": last,
        }
    )


def _examples(before: list[Judged], after: list[Judged]) -> list[tuple[Judged, Judged]]:
    """Three prompts whose answers changed, of different kinds where there are some."""
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a.answer != b.answer]
    chosen: dict[str, tuple[Judged, Judged]] = {}
    for pair in changed:
        chosen.setdefault(pair[0].kind, pair)
    spread = [*chosen.values(), *changed]
    return spread[:3]


def read(run: RunDirectory) -> str:
    """The table, three answers side by side and the interval of the gain, for a terminal."""
    from cluster.run_directory import read_json_lines

    found = run.summary()
    assert found is not None, "read the results of a finished run"
    wide = max(len(row[""]) for row in found["Held-out results"])
    lines = [
        f"{'Held-out results on ' + str(found['prompts']) + ' prompts':<{wide}}    before     after"
    ]
    for row in found["Held-out results"]:
        lines.append(f"{row['']:<{wide}}  {row['before']:8.3f}  {row['after']:8.3f}")
    lines.append(
        f"Gain: {found['gain']:+.3f} ± {found['gain_standard_error']:.3f} (standard error)."
    )
    for sample in read_json_lines(run.samples):
        lines += [
            "",
            f"Prompt  {sample['prompt']}",
            f"Before  {sample['before']}",
            f"After   {sample['after']}",
        ]
    return "\n".join(lines)
