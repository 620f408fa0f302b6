"""Readers of a user's data: a folder of images, a NumPy archive, or a CSV table.

    images:DIR        DIR/CLASS/FILE, or DIR with a labels.csv of path,label
    npz:FILE          arrays X and y (or images and labels), optionally X_test, y_test
    csv:FILE          a table with a header; csv:FILE#NAME names the label column

Labels may be strings or numbers. Examples that cannot be used (an unreadable image, a
row without a label) are skipped and listed with a reason. Changes to the data (resized
images, columns that are left out) are described in notes.
"""

from l2rw_jax.data.own_data.containers import Form
from l2rw_jax.data.own_data.containers import OwnData
from l2rw_jax.data.own_data.containers import duplicates
from l2rw_jax.data.own_data.containers import num_copies
from l2rw_jax.data.own_data.containers import report
from l2rw_jax.data.own_data.csv_files import corrected_labels
from l2rw_jax.data.own_data.csv_files import csv_cell
from l2rw_jax.data.own_data.pixel_scale import BYTES
from l2rw_jax.data.own_data.pixel_scale import Pixels
from l2rw_jax.data.own_data.pixel_scale import pixels_of
from l2rw_jax.data.own_data.reading import KINDS
from l2rw_jax.data.own_data.reading import is_own
from l2rw_jax.data.own_data.reading import read
from l2rw_jax.data.own_data.table_encoder import Encoder
