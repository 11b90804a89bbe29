"""A client to read and to copy: asks a trivium server about pictures with nothing but numpy and tritonclient.

    python -m trivium.export.demo_client --url 127.0.0.1:8001 --model fashion-mnist --pictures pictures.npz

The .npz holds `images` uint8 [N, H, W, 3] in the model's size, `truth` (names of the right classes) and `kind` (what
was done to each picture), both [N]. `--answers FILE` keeps what came back, as JSON.
"""

import argparse
import json

import numpy as np
import tritonclient.grpc as triton

OUTPUTS = ("class_id", "label", "head", "probabilities", "predictive_entropy", "mutual_information", "divergence")


def ask(
    client: triton.InferenceServerClient, model: str, images: np.ndarray, timeout: float = 30.0
) -> dict[str, np.ndarray]:
    """One request with uint8 pictures [N, H, W, 3]; returns each of OUTPUTS as an array [N, ...].

    timeout: seconds. Raises: tritonclient.utils.InferenceServerException.
    """
    image = triton.InferInput("image", list(images.shape), "UINT8")
    image.set_data_from_numpy(images)
    wanted = [triton.InferRequestedOutput(name) for name in OUTPUTS]
    answer = client.infer(model, [image], outputs=wanted, client_timeout=timeout)
    return {name: answer.as_numpy(name) for name in OUTPUTS}


def main() -> None:
    """Ask about every picture, print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="127.0.0.1:8001", help="of the server's gRPC (default 127.0.0.1:8001)")
    parser.add_argument("--model", required=True, help="its name")
    parser.add_argument("--pictures", required=True, help="the .npz described above")
    parser.add_argument("--batch", type=int, default=8, help="pictures in a request (default 8)")
    parser.add_argument("--answers", help="JSON file to write")
    given = parser.parse_args()
    with np.load(given.pictures, allow_pickle=False) as file:
        images, truth, kind = file["images"], file["truth"], file["kind"]

    rows = []
    client = triton.InferenceServerClient(given.url)
    # the order of the axis K of every answer per head
    heads = client.get_model_config(given.model).config.parameters["heads"].string_value.split(",")
    for start in range(0, len(images), given.batch):
        answer = ask(client, given.model, images[start : start + given.batch])
        for i, head in enumerate(answer["head"]):
            # The heads that answered: one, or several where their mean did ("mean", "clean+combined").
            own = [heads.index(name) for name in head.decode().split("+") if name in heads] or list(range(len(heads)))
            row = {
                "kind": str(kind[start + i]),
                "truth": str(truth[start + i]),
                "answer": answer["label"][i].decode(),
                "head": head.decode(),
                "probability": float(answer["probabilities"][i].max()),
                "entropy": float(answer["predictive_entropy"][i, own].mean()),
                "information": float(answer["mutual_information"][i, own].mean()),
                "divergence": None,
            }
            if "clean" in heads and "robust" in heads:
                row["divergence"] = float(answer["divergence"][i, heads.index("clean"), heads.index("robust")])
            rows.append(row)
    client.close()

    columns = (
        f"{'kind':20} {'true label':12} {'answer':12}   {'head':15} {'p':>5} {'entropy':>8} {'MI':>6} {'KL c-r':>7}"
    )
    print(f"{columns}\n{'-' * len(columns)}")
    for row in rows:
        mark = " " if row["truth"] == row["answer"] else "x"
        divergence = "-" if row["divergence"] is None else f"{row['divergence']:.3f}"
        print(
            f"{row['kind']:20.20} {row['truth']:12.12} {row['answer']:12.12} {mark} {row['head']:15} "
            f"{row['probability']:5.2f} {row['entropy']:8.3f} {row['information']:6.3f} {divergence:>7}"
        )
    print("entropy (of the prediction), MI (mutual information) and KL (clean head from robust head) in nats; x: wrong")
    if given.answers:
        with open(given.answers, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
