"""README.md is nbs/index.ipynb as Markdown: `python tests/readme.py` writes it, a test compares it."""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]

def readme_text():
    "The index page with its links pointing into nbs/, hidden cells left out"
    parts = ['<!-- Made from nbs/index.ipynb by `python tests/readme.py`; edit that. -->']
    for cell in nbformat.read(ROOT/'nbs/index.ipynb', 4).cells:
        if cell.cell_type == 'markdown': parts.append(re.sub(r'\]\((?!https?:)([\w/.]+)\)', r'](nbs/\1)', cell.source))
        elif not cell.source.startswith('#| hide'):
            shown = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell.outputs]
            parts += [f'```python\n{cell.source}\n```', *(f'    {t.strip()}'.replace('\n', '\n    ') for t in shown if t)]
    return '\n\n'.join(parts)+'\n'

if __name__ == '__main__': (ROOT/'README.md').write_text(readme_text())
