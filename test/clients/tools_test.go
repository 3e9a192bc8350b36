package clients

import (
	"encoding/json"
	"slices"
	"strings"
	"syscall"
	"testing"

	"graindisk/test/harness"
)

// export is what the tests want of nbdinfo --json.
type export struct {
	Name        string `json:"export-name"`
	Description string `json:"description"`
	Size        int64  `json:"export-size"`
	Minimum     int64  `json:"block_size_minimum"`
	Preferred   int64  `json:"block_size_preferred"`
	Maximum     int64  `json:"block_size_maximum"`
}

func TestNbdinfo(t *testing.T) {
	harness.Need(t, "nbdinfo")
	s := serve(t)
	var info struct {
		Protocol   string
		Structured bool
		Exports    []export
	}
	if err := json.Unmarshal([]byte(harness.Must(t, "nbdinfo", "--json", s.uri("vm1"))), &info); err != nil {
		t.Fatal(err)
	}
	want := export{"vm1", "disk vm1", diskBytes, 1, 4096, 32 << 20}
	if info.Protocol != "newstyle-fixed" || !info.Structured || !slices.Equal(info.Exports, []export{want}) {
		t.Errorf("nbdinfo tells %+v, want %+v", info, want)
	}
	if got := harness.Must(t, "nbdinfo", "--size", s.uri("big")); got != "1099511627776\n" {
		t.Errorf("size of big is %q", got)
	}
	if err := json.Unmarshal([]byte(harness.Must(t, "nbdinfo", "--list", "--json", "nbd+unix://?socket="+s.socket())), &info); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range info.Exports {
		names = append(names, e.Name)
	}
	if !slices.Equal(names, []string{"big", "vm1", "vm2"}) {
		t.Errorf("nbdinfo lists %q", names)
	}
	r := harness.Command(t, "nbdinfo", s.uri("nope"))
	if r.Code == 0 || !strings.Contains(r.Stderr, "No such file") {
		t.Errorf("an export that is not there: exit %d, %s", r.Code, r.Stderr)
	}
}

// piece is one range of nbdinfo --map.
type piece struct {
	Offset, Length int64
	Type           uint32
}

// TestMaps stores some blocks of an empty disk and asks both tools what is there, before and after a kill.
func TestMaps(t *testing.T) {
	for _, tool := range []string{"nbdinfo", "qemu-img", "qemu-io"} {
		harness.Need(t, tool)
	}
	s := serve(t)
	harness.Must(t, "qemu-io", "-f", "raw", "-d", "unmap", s.uri("vm1"), "-c", "write -P 1 1M 64k", "-c", "write -P 2 5000 10",
		"-c", "write -P 3 8M 2M", "-c", "discard 9M 512k", "-c", "write -z 8M 4k", "-c", "flush")
	const (
		hole = 3
		data = 0
		m    = 1 << 20
	)
	want := []piece{{0, 4096, hole}, {4096, 4096, data}, {8192, m - 8192, hole}, {m, 65536, data}, {m + 65536, 7*m - 65536 + 4096, hole},
		{8*m + 4096, m - 4096, data}, {9 * m, m / 2, hole}, {9*m + m/2, m / 2, data}, {10 * m, 54 * m, hole}}
	for range 2 {
		var got []piece
		if err := json.Unmarshal([]byte(harness.Must(t, "nbdinfo", "--map", "--json", s.uri("vm1"))), &got); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("nbdinfo --map: %v\nwant %v", got, want)
		}
		var qemu []struct {
			Start, Length int64
			Zero, Data    bool
		}
		if err := json.Unmarshal([]byte(harness.Must(t, "qemu-img", "map", "--output=json", "-f", "raw", s.uri("vm1"))), &qemu); err != nil {
			t.Fatal(err)
		}
		got = nil
		for _, e := range qemu {
			kind := uint32(hole)
			if e.Data || !e.Zero {
				kind = data
			}
			got = append(got, piece{e.Start, e.Length, kind})
		}
		if !slices.Equal(got, want) {
			t.Errorf("qemu-img map: %v\nwant %v", got, want)
		}
		s.restart()
	}
	if got := harness.Must(t, "nbdinfo", "--map", "--totals", s.uri("big")); !strings.Contains(got, "100.0%") || !strings.Contains(got, "hole,zero") {
		t.Errorf("an empty disk of 1 TiB: %s", got)
	}
}

// TestSparseCopies copies an image with holes in, out and between disks, and expects the holes to stay holes.
func TestSparseCopies(t *testing.T) {
	for _, tool := range []string{"nbdinfo", "nbdcopy", "qemu-img"} {
		harness.Need(t, tool)
	}
	s := serve(t)
	image := s.image("image", 3)
	holes := func(disk string) (n int64) {
		t.Helper()
		var pieces []piece
		if err := json.Unmarshal([]byte(harness.Must(t, "nbdinfo", "--map", "--json", s.uri(disk))), &pieces); err != nil {
			t.Fatal(err)
		}
		for _, p := range pieces {
			if p.Type == 3 {
				n += p.Length
			}
		}
		return n
	}
	const wantHoles = 12 << 20 // every fifth MiB of the image from the fourth on is a hole, the next zero but for its edges
	harness.Must(t, "nbdcopy", "--flush", "--connections=4", "--destination-is-zero", image, s.uri("vm1"))
	if n := holes("vm1"); n < wantHoles {
		t.Errorf("nbdcopy in: %d bytes of holes", n)
	}
	harness.Must(t, "nbdcopy", "--flush", "--connections=4", s.uri("vm1"), s.uri("vm2"))
	if n := holes("vm2"); n < wantHoles {
		t.Errorf("nbdcopy from disk to disk: %d bytes of holes", n)
	}
	harness.Must(t, "nbdcopy", "--connections=4", s.uri("vm2"), s.path("out"))
	s.same(image, s.path("out"))
	if n := stored(t, s.path("out")); n > diskBytes-wantHoles+1<<20 {
		t.Errorf("nbdcopy out: %d bytes stored", n)
	}

	harness.Must(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri("vm1"), s.path("out.qcow2"))
	harness.Must(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", s.path("out.qcow2"), image)
	if n := stored(t, s.path("out.qcow2")); n > diskBytes-wantHoles+1<<20 {
		t.Errorf("qemu-img convert: %d bytes stored", n)
	}
	harness.Must(t, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", s.path("out.qcow2"), s.uri("vm2")) // over what is there
	harness.Must(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", s.uri("vm1"), s.uri("vm2"))
	if n := holes("vm2"); n < wantHoles {
		t.Errorf("qemu-img convert back: %d bytes of holes", n)
	}
}

// stored is how many bytes a file takes on its file system.
func stored(t *testing.T, name string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestNbdClientList(t *testing.T) {
	t.Setenv("PATH", "/usr/sbin:/sbin:"+pathEnv())
	harness.Need(t, "nbd-client")
	s := serve(t)
	if got := strings.Fields(harness.Must(t, "nbd-client", "-l", "-unix", s.socket())); !slices.Equal(got[max(0, len(got)-3):], []string{"big", "vm1", "vm2"}) {
		t.Errorf("nbd-client lists %q", got)
	}
}

func TestNbdcopyInAndOut(t *testing.T) {
	harness.Need(t, "nbdcopy")
	s := serve(t)
	image := s.image("image", 1)
	for _, connections := range []string{"1", "4"} {
		harness.Must(t, "nbdcopy", "--flush", "--connections="+connections, image, s.uri("vm1"))
		harness.Must(t, "nbdcopy", "--connections="+connections, s.uri("vm1"), s.path("out"+connections))
		s.same(image, s.path("out"+connections))
	}
	harness.Must(t, "nbdcopy", "--flush", "--connections=4", s.uri("vm1"), s.uri("vm2")) // from disk to disk
	s.restart()
	harness.Must(t, "nbdcopy", "--connections=4", s.uri("vm2"), s.path("out"))
	s.same(image, s.path("out"))
}

func TestQemuImg(t *testing.T) {
	harness.Need(t, "qemu-img")
	s := serve(t)
	image := s.image("image", 2)
	if out := harness.Must(t, "qemu-img", "info", "--output=json", s.uri("vm1")); !strings.Contains(out, `"virtual-size": 67108864`) {
		t.Errorf("qemu-img info tells %s", out)
	}
	harness.Must(t, "qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", image, s.uri("vm1"))
	harness.Must(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, s.uri("vm1"))
	harness.Must(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", s.uri("vm1"), s.path("out"))
	s.same(image, s.path("out"))
	// A qcow2 image inside the disk: metadata updates, and a check of them by qemu itself.
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", s.uri("vm2"), "32M")
	harness.Must(t, "qemu-io", "-f", "qcow2", s.uri("vm2"), "-c", "write -P 0x5a 1M 3M", "-c", "discard 2M 1M", "-c", "flush")
	harness.Must(t, "qemu-img", "check", "-f", "qcow2", s.uri("vm2"))
	if r := harness.Command(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, s.uri("vm2")); r.Code != 1 {
		t.Errorf("different disks compare with exit %d, want 1", r.Code)
	}
}

func TestQemuIO(t *testing.T) {
	harness.Need(t, "qemu-io")
	s := serve(t)
	qemuIO := func(commands ...string) {
		t.Helper()
		args := []string{"-f", "raw", "-d", "unmap", "-t", "none", s.uri("vm1")}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		r := harness.Command(t, "qemu-io", args...)
		if out := r.Stdout + r.Stderr; r.Code != 0 || strings.Contains(out, "failed") {
			t.Fatalf("qemu-io %q: exit %d\n%s", commands, r.Code, out)
		}
	}
	checks := []string{
		"read -P 0x11 0 64k", "read -P 0 64k 8k", "read -P 0x22 72k 56k",
		"read -P 0x33 1M 512", "read -P 0 1049088 1024", "read -P 0x33 1050112 510464",
		"read -P 0 4M 1M", "read -P 0x44 67108352 512",
	}
	qemuIO(append([]string{
		"write -f -P 0x11 0 64k", "write -P 0x22 64k 64k", "discard 64k 8k",
		"write -P 0x33 1M 500k", "write -z 1049088 1024",
		"write -P 0x55 4M 1M", "write -z -u 4M 1M", "write -P 0x44 67108352 512",
		"aio_write -P 0x66 8M 1M", "aio_write -P 0x77 9M 1M", "aio_flush", "flush",
	}, checks...)...)
	checks = append(checks, "read -P 0x66 8M 1M", "read -P 0x77 9M 1M")
	qemuIO(checks...)
	s.restart()
	qemuIO(checks...)
}

func TestFio(t *testing.T) {
	harness.Need(t, "fio")
	s := serve(t)
	fio := func(disk string, args ...string) {
		t.Helper()
		harness.Must(t, "fio", append([]string{"--name=fio", "--ioengine=nbd", "--uri=" + s.uri(disk), "--iodepth=16",
			"--verify_state_save=0", "--verify_fatal=1", "--randseed=1"}, args...)...)
	}
	crc := []string{"--verify=crc32c", "--do_verify=1"}
	fio("vm1", append(crc, "--rw=randwrite", "--bs=4k", "--size=16m", "--fsync=64")...)
	fio("vm1", append(crc, "--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--offset=16m", "--size=16m")...)
	fio("vm1", append(crc, "--rw=write", "--bs=1m", "--offset=32m", "--size=16m", "--verify_async=2")...)
	s.restart()
	fio("vm1", append(crc, "--rw=randwrite", "--bs=4k", "--size=16m", "--verify_only")...)
	fio("vm1", append(crc, "--rw=write", "--bs=1m", "--offset=32m", "--size=16m", "--verify_only")...)

	fio("vm1", "--rw=randtrim", "--bs=64k", "--size=16m")
	zero := []string{"--verify=pattern", "--verify_pattern=0x00", "--verify_only", "--rw=write", "--bs=64k"}
	fio("vm1", append(zero, "--size=16m")...)
	fio("vm1", append(crc, "--rw=write", "--bs=1m", "--offset=32m", "--size=16m", "--verify_only")...)
	fio("vm2", "--rw=randrw", "--bs=4k", "--size=32m", "--numjobs=4", "--group_reporting")
	fio("vm2", "--rw=randtrimwrite", "--bs=8k", "--size=8m")
}
