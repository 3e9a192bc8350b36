// Command bench measures the gateway beside qemu-nbd on a raw file of the same size on the same disk,
// both behind a unix socket, loaded by fio's nbd engine. It prints a table and writes the same
// figures, with every flag used, as JSON.
//
//	go run ./bench                        every row, in less than ten minutes
//	go run ./bench -rows randread,upload  these only
//
// What is measured against what:
//
//	row         load                                         beside
//	----------------------------------------------------------------------------------------
//	randread    4 KiB random reads at depth 32, cached       the faster of two qemu-nbd modes
//	seqread     1 MiB sequential reads at depth 4, cached    the same
//	wire        4 KiB random reads at depth 32 and 1, one    the same, nbdkit's memory
//	            and four connections, 1 MiB sequential       and file plugins
//	            reads, of 64 MiB in RAM
//	readtail    p99 of 4 KiB cached reads at depth 1 while   the same, idle
//	            1 MiB writes are uploaded at full speed
//	coldread    1 MiB sequential reads, tier dropped         qemu-nbd, raw file out of the page cache
//	writeflush  4 KiB random write, FLUSH after each         the faster of two qemu-nbd modes
//	randwrite   4 KiB random writes at depth 32              the same
//	recover     kill -9 during randwrite, to "ready"         -
//	outage      4 KiB write + FLUSH, targets that hang       the same, targets that answer
//	wear        SSD bytes per byte, 64 KiB and flushed 4 KiB -
//	scrub       all of 256 MiB, 2+1, one target half as      that target's bandwidth; p99 of reads
//	            fast as the others, 10 ms per request        that miss, idle
//	repair      the shards of that target restored, when     the same, and p99 of writes
//	            it was replaced by an empty one
//	seqwrite    1 MiB sequential writes at depth 4           the faster of two qemu-nbd modes
//	upload      CPU and requests to store 1 GiB, 4+2         -
//	reopen      kill -9 with 1, 2, 4 GiB unpublished, to     -
//	            the first read; targets answer, or hang
//	fresh       open of a pool with 1 TiB mapped, on a       -
//	            fresh host, 30 ms per request
//
// Rows run in this order, since each leaves the disk as the next wants it. Runs of a row are
// interleaved, and the median counts. The gateway uploads all the time, 2+1 to three directories on
// the disk that holds its tier. A write that only fills the log is not a measurement: a write row
// counts only if the run lasts a minute, with no more unpublished at its end than at half time.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"graindisk/config"
)

// options are the flags.
type options struct {
	rows      []string
	dir       string // of data and of the results
	disk      int64  // bytes
	rounds    int
	readTime  time.Duration // of each read run, and each run of a baseline
	writeTime time.Duration // of the gateway's run in a write row
	dirtyAge  time.Duration
}

// rows in the order in which they run.
var rows = []struct {
	name string
	run  func(*bench, context.Context) error
}{
	{"randread", (*bench).randRead},
	{"seqread", (*bench).seqRead},
	{"wire", (*bench).wire},
	{"readtail", (*bench).readTail},
	{"coldread", (*bench).coldRead},
	{"writeflush", (*bench).writeFlush},
	{"randwrite", (*bench).randWrite},
	{"recover", (*bench).recover},
	{"outage", (*bench).outage},
	{"wear", (*bench).wear},
	{"scrub", (*bench).scrub},
	{"repair", (*bench).repair},
	{"seqwrite", (*bench).seqWrite},
	{"upload", (*bench).upload},
	{"reopen", (*bench).reopen},
	{"unmap", (*bench).unmap},
	{"fresh", (*bench).fresh},
}

func rowNames() []string {
	var names []string
	for _, r := range rows {
		names = append(names, r.name)
	}
	return names
}

func parseFlags() (options, error) {
	var o options
	list := flag.String("rows", strings.Join(rowNames(), ","), "rows to run")
	size := flag.String("size", "4GiB", "size of the disk, filled before the first run")
	flag.StringVar(&o.dir, "dir", filepath.Join("bench", "out"), "where the data and the results go; give it a real disk")
	flag.IntVar(&o.rounds, "rounds", 3, "runs of each read and baseline, of which the median counts")
	flag.DurationVar(&o.readTime, "read-time", 2*time.Second, "length of each read run and of each baseline run")
	flag.DurationVar(&o.writeTime, "write-time", time.Minute, "length of the gateway's run in a write row")
	flag.DurationVar(&o.dirtyAge, "max-dirty-age", 5*time.Second, "the pool's max_dirty_age")
	flag.Parse()
	var errs []error
	o.rows = strings.Split(*list, ",")
	for _, r := range o.rows {
		if !slices.Contains(rowNames(), r) {
			errs = append(errs, fmt.Errorf("-rows: %q is none of %s", r, strings.Join(rowNames(), ", ")))
		}
	}
	bytes, err := config.ParseSize(*size)
	if err != nil || bytes < 64<<20 || bytes%(1<<20) != 0 {
		errs = append(errs, fmt.Errorf("-size: %q is not a number of MiB of at least 64MiB", *size))
	}
	if o.rounds < 1 || o.readTime < time.Second || o.writeTime < 2*time.Second {
		errs = append(errs, errors.New("-rounds must be at least 1, -read-time 1s and -write-time 2s"))
	}
	o.disk = int64(bytes)
	return o, errors.Join(errs...)
}

func main() {
	o, err := parseFlags()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run of the program.
type bench struct {
	o      options
	bin    string // the gateway
	dir    string // data of this run, removed at its end
	report report

	gw    *gateway // nil until a row needs it, and again before one that wants a fresh one
	qemus []*qemu  // nil until a row needs them
}

func run(ctx context.Context, o options) (err error) {
	programs := []string{"fio", "qemu-nbd"}
	if slices.Contains(o.rows, "wire") {
		programs = append(programs, "nbdkit")
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			return fmt.Errorf("%s is not installed: run \"make test-tools\"", p)
		}
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	b := &bench{o: o}
	if b.dir, err = os.MkdirTemp(o.dir, "data-"); err != nil {
		return err
	}
	defer func() {
		b.stop()
		err = errors.Join(err, os.RemoveAll(b.dir))
	}()
	if err := b.roomy(); err != nil {
		return err
	}
	b.bin = filepath.Join(b.dir, "gateway")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", b.bin, "graindisk/cmd/gateway").CombinedOutput(); err != nil {
		return fmt.Errorf("build the gateway: %w\n%s", err, out)
	}
	b.report.start(o)
	for _, r := range rows {
		if !slices.Contains(o.rows, r.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s ...\n", r.name)
		if err := r.run(b, ctx); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	b.report.finish()
	b.report.print(os.Stdout)
	return b.report.save(o.dir)
}

// roomy refuses to start where a run would fill the disk: the tier, the raw file, and what a minute of
// writes sends to the targets, which nothing takes back during the run.
func (b *bench) roomy() error {
	need := tierBytes + 3*b.o.disk
	if slices.ContainsFunc(b.o.rows, isWriteRow) {
		need += int64(1.5 * 350e6 * b.o.writeTime.Seconds())
	}
	if slices.Contains(b.o.rows, "reopen") {
		need = max(need, b.o.disk+reopenTier) // the rows before have gone, but for the raw file
	}
	var st unix.Statfs_t
	if err := unix.Statfs(b.dir, &st); err != nil {
		return fmt.Errorf("%s: %w", b.dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return fmt.Errorf("%s has %d GiB free, and %d are needed: choose another -dir or smaller flags", b.dir, free>>30, need>>30)
	}
	return nil
}

func isWriteRow(name string) bool {
	return slices.Contains([]string{"writeflush", "randwrite", "seqwrite"}, name)
}

// stop ends the servers that run.
func (b *bench) stop() {
	b.dropGateway()
	for _, q := range b.qemus {
		q.proc.kill()
	}
	b.qemus = nil
}
