"""What LRKD is compared with: students whose reasoning is a training signal alone, and gone at inference.

| `--rival` | loss | source |
|---|---|---|
| `ced_kd` | CE + β · NLL of the rationale, decoded from H | CED-KD, COLING 2025 industry track |
| `mkd` | CE + b · NLL of BIO tags, a CRF on H (+ a · KL to the teacher's votes) | MKD, arXiv 2411.13045 |
| `crsd` | CE + CE with the rationale in the input + λ · InfoNCE of the two (+ KL) | CRSD, arXiv 2510.11056 |

Each is a module with its student; all read the text of the rationales (column `rationale`) that guide LRKD, and leave a
plain checkpoint behind. The full texts of the three sources were not at hand: each module says what is our reading.
"""
