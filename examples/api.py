"""The demo through the Python API: the same power as the command line."""

from fedpeat import load_config, run

if __name__ == "__main__":
    summary = run(load_config("examples/demo.yaml"), overwrite=True)
    quality = summary["quality"]
    print(f"{quality['full_zero_shot']:.2f} -> {quality['plug_in']:.2f} perplexity")
    print(f"{quality['gap_closed']:.0%} of the way to tuning the full model itself")
    print(f"{summary['cost']['bytes_up'] / 1e6:.1f} MB sent up; report in runs/demo/report.html")
