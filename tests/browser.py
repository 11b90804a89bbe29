"""A real browser to look at pages with: headless Chromium, where the machine has one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WHY_NOT = "no Chromium on this machine: apt-get install chromium"


def overflow(page: Path, width: int) -> int:
    """Show a page in a window of this width; by how many pixels it is wider than that, to be scrolled sideways.

    Fails where the page writes anything to the console. A picture of it lies beside it, as shot.png.
    """
    # the page reports its own layout
    probe = "<script>console.log('WIDTH', document.documentElement.scrollWidth - innerWidth)</script></body>"
    probed = page.with_name(f"probed-{page.name}")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
            f"--user-data-dir={page.with_name('profile')}", f"--window-size={width},2000",
            f"--screenshot={page.with_name('shot.png')}", probed.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert len(console) == 1, done.stderr[-2000:]
    picture = np.asarray(Image.open(page.with_name("shot.png")).convert("L"))
    assert picture.shape[1] == width
    assert picture.std() > 5
    found = re.search(r"WIDTH (-?\d+)", console[0])
    assert found is not None
    return int(found[1])
