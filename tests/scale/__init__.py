"""Several replicas of one bundle: what their clients see when one dies, drains or freezes, and how many it takes."""
