"""The command line: peftk demo, bench, selftest. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path

import click

from peftk.extras import MissingExtraError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="peftk")
def main() -> None:
    """Kernels that make parameter-efficient fine-tuning free."""


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("peftk-demo"),
    show_default=True,
    help="Folder for demo.png and demo.json.",
)
@click.option("--quick", is_flag=True, help="Fewer ranks, adapters and steps: well under a minute.")
def demo(out: Path, quick: bool) -> None:
    """peftk on a real pretrained model, in under three minutes.

    Adapts every linear of all-MiniLM-L6-v2; compares latency per rank with the plain model and HF PEFT; serves LoRAs of
    many ranks in one batch; trains one; merges and unmerges exactly. Exits with 1 if any check fails.
    """
    from peftk import demo as demo_package

    try:
        passed = demo_package.run(out, quick=quick)
    except MissingExtraError as error:
        raise click.ClickException(str(error)) from error
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
