"""The style of everything that the guide draws, in JupyterLab's theme colours."""

from pathlib import Path

STYLE = (Path(__file__).parent / "data" / "panel.css").read_text("utf-8")
# A page that does not trust the notebook yet drops it, so everything has to read well without.
STYLE_TAG = f"<style>{STYLE}</style>"
