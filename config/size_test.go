package config

import (
	"math"
	"reflect"
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Bytes
	}{
		{"0", 0}, {"1", 1}, {"4096", 4096}, {"1B", 1}, {"007", 7},
		{"1K", 1 << 10}, {"1KiB", 1 << 10}, {"1KB", 1000},
		{"3M", 3 << 20}, {"3MiB", 3 << 20}, {"3MB", 3e6},
		{"10G", 10 << 30}, {"10GiB", 10 << 30}, {"10GB", 10e9},
		{"64T", 64 << 40}, {"64TiB", 64 << 40}, {"64TB", 64e12},
		{"9223372036854775807", math.MaxInt64}, {"8388607TiB", 8388607 << 40},
	} {
		got, err := ParseSize(c.in)
		if err != nil || got != c.want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", c.in, got, err, c.want)
		}
	}
	for _, in := range []string{
		"", "-1", "-1GiB", "+1", "GiB", "1.5GiB", "1 GiB", " 1", "1 ", "1gib", "1kB", "1PiB", "1Ki", "0x10",
		"1e3", "1_000", "9223372036854775808", "8388608TiB", "9223373TB", "99999999999999999999", "١",
	} {
		if got, err := ParseSize(in); err == nil {
			t.Errorf("ParseSize(%q) = %d; want an error", in, got)
		}
	}
}

func TestBytesPrintAsTheyAreRead(t *testing.T) {
	for in, want := range map[Bytes]string{0: "0", 1: "1", 1000: "1000", 1024: "1KiB", 1536: "1536", 10 << 30: "10GiB", 1 << 50: "1024TiB"} {
		if in.String() != want {
			t.Errorf("%d prints as %s; want %s", int64(in), in, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"1", "10GiB", "-5", "1KB", "99999999TiB"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if err != nil {
			return
		}
		if n < 0 {
			t.Fatalf("ParseSize(%q) = %d, negative", s, n)
		}
		if again, err := ParseSize(n.String()); err != nil || again != n {
			t.Fatalf("%q is %d bytes, printed %s, read back as %d, %v", s, n, n, again, err)
		}
	})
}

func TestDiskNames(t *testing.T) {
	for _, ok := range []string{"a", "0", "vm-1.data_x", strings.Repeat("a", 63)} {
		if err := CheckDiskName(ok); err != nil {
			t.Errorf("%q: %v", ok, err)
		}
	}
	for _, bad := range []string{"", "-a", ".a", "_a", "A", "aB", "a b", "a/b", "a@b", "ä", "a\n", strings.Repeat("a", 64)} {
		if CheckDiskName(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestDiskSizes(t *testing.T) {
	for _, ok := range []Bytes{MiB, MiB + 4096, 64 * TiB} {
		if err := CheckDiskSize(ok); err != nil {
			t.Errorf("%v: %v", ok, err)
		}
	}
	for _, bad := range []Bytes{0, -4096, MiB - 4096, MiB + 1, 64*TiB + 4096, 64*TiB - 1} {
		if CheckDiskSize(bad) == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
}

func TestParseDisk(t *testing.T) {
	if d, err := ParseDisk("vm1=10GiB"); err != nil || !reflect.DeepEqual(d, Disk{Name: "vm1", Size: 10 * GiB}) {
		t.Errorf("vm1=10GiB is %+v, %v", d, err)
	}
	for _, bad := range []string{"", "vm1", "=1GiB", "vm1=", "VM=1GiB", "vm1=1", "vm1=1GiB=2", "vm1=4097KiB"} {
		if d, err := ParseDisk(bad); err == nil {
			t.Errorf("%q is %+v; want an error", bad, d)
		}
	}
}
