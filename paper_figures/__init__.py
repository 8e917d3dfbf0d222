"""The paper's figures, drawn from the committed results alone: `python -m paper_figures`."""
