package kill

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"

	"graindisk/test/harness"
)

// copyImageIn makes an ext4 file system with random files and copies it to the disk "image".
func (w *world) copyImageIn() {
	w.t.Helper()
	files := w.path("files")
	if err := os.Mkdir(files, 0o700); err != nil {
		w.t.Fatal(err)
	}
	var seed [32]byte
	for i := range seed {
		seed[i] = byte(w.rng.Uint32())
	}
	random := rand.NewChaCha8(seed)
	for i := range 50 {
		p := make([]byte, w.rng.IntN(1<<20))
		random.Read(p)
		if err := os.WriteFile(fmt.Sprintf("%s/file%02d", files, i), p, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	harness.Must(w.t, "mkfs.ext4", "-q", "-F", "-d", files, w.path("image"), strconv.Itoa(imageBytes>>10)+"k")
	harness.Must(w.t, "nbdcopy", w.path("image"), w.uri("image"))
}

// compareImage copies the disk "image" out again: it must be what was copied in, and sound.
func (w *world) compareImage() {
	w.t.Helper()
	harness.Must(w.t, "nbdcopy", w.uri("image"), w.path("back"))
	want, err := os.ReadFile(w.path("image"))
	if err != nil {
		w.t.Fatal(err)
	}
	got, err := os.ReadFile(w.path("back"))
	if err != nil {
		w.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		at := 0
		for at < min(len(got), len(want)) && got[at] == want[at] {
			at++
		}
		w.t.Errorf("the image of %d bytes came back as %d, different from byte %d on", len(want), len(got), at)
	}
	harness.Must(w.t, "e2fsck", "-fn", w.path("back"))
}

// fioPass has fio write part of the disk "fio" and verify it, beside the load.
func (w *world) fioPass(seed uint64) { w.t.Helper(); w.fio(seed) }

// fioVerify has fio verify, after a kill, what the pass of that seed wrote.
func (w *world) fioVerify(seed uint64) { w.t.Helper(); w.fio(seed, "--verify_only") }

func (w *world) fio(seed uint64, more ...string) {
	w.t.Helper()
	harness.Must(w.t, "fio", append([]string{
		"--name=verify", "--ioengine=nbd", "--uri=" + w.uri("fio"), "--rw=randwrite", "--bs=12k", "--size=24m",
		"--iodepth=8", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0",
		"--randseed=" + strconv.FormatUint(seed+1, 10),
	}, more...)...)
}
