"""One file a group of ``ctl``'s commands; ``ops/ctl.py`` puts them together."""
