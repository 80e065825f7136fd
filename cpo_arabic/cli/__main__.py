"""``python -m cpo_arabic.cli`` is ``cpo-arabic``."""

from cpo_arabic.cli import main

main()
