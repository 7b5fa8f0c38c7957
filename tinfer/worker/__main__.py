"""`python -m tinfer.worker`: the zygote, or one worker where forking is not possible."""

from tinfer.worker.zygote import main

if __name__ == "__main__":
    main()
