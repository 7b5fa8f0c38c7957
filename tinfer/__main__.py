"""`python -m tinfer`."""

from tinfer.cli import main

if __name__ == "__main__":
    main(prog_name="tinfer")
