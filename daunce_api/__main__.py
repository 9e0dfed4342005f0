"""``daunce``, and ``python -m daunce_api`` where the script is not on the path."""


def main() -> None:
    """The command line; Ctrl-C ends it without a traceback also while it is still being imported."""
    try:
        from daunce_api.cli import main as command_line
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    command_line()


if __name__ == "__main__":
    main()
