// Package jobs runs the long work of a gateway: repairs, scrubs, moves. A job is started by a request that returns at
// once, and is looked after by its id from then on, by whoever asks:
//
//	running ──► done       its function returned nil
//	   │   ───► failed     its function returned an error, or panicked
//	   └──────► cancelled  Cancel or Close ended it before it was done
//
// There is one job of a kind for one subject at a time. What a job has done must not depend on its end being heard
// of: ids and reports are gone with the process.
package jobs

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// What callers branch on.
var (
	// ErrRunning means that a job of that kind is under way for that subject.
	ErrRunning = errors.New("is under way already")
	// ErrNoJob means that there is no job of that id.
	ErrNoJob = errors.New("no such job")
	// ErrClosed means that the process is ending.
	ErrClosed = errors.New("the gateway is ending")
)

// State is where a job is.
type State string

// The states of a job. Only a running one changes.
const (
	Running   State = "running"
	Done      State = "done"
	Failed    State = "failed"
	Cancelled State = "cancelled"
)

// Job describes a job at one moment.
type Job struct {
	ID       string     `json:"id"`
	Kind     string     `json:"kind"`    // "repair"
	Subject  string     `json:"subject"` // the pool
	State    State      `json:"state"`
	Started  time.Time  `json:"started"`
	Ended    *time.Time `json:"ended,omitempty"`
	Progress Progress   `json:"progress"`
	Error    string     `json:"error,omitempty"`  // of a failed job
	Report   any        `json:"report,omitempty"` // what it has done, by kind; also of one that failed or was cancelled
}

// Progress is how far a job is. Totals are what is known of them; 0 is nothing.
type Progress struct {
	ItemsDone      int64   `json:"items_done"` // segments, objects
	ItemsTotal     int64   `json:"items_total"`
	BytesDone      int64   `json:"bytes_done"`
	BytesTotal     int64   `json:"bytes_total"`
	BytesPerSecond float64 `json:"bytes_per_second"`
}

// Work does the job until it is done or ctx ends. It may tell how far it is, from any goroutine. The report is kept
// even beside an error.
type Work func(ctx context.Context, tell func(Progress)) (report any, err error)

// kept is how many jobs that have ended are remembered.
const kept = 64

// Runner runs jobs. Its methods are safe for concurrent use.
type Runner struct {
	prefix string // ids of another process are not mistaken for ours

	mu     sync.Mutex
	closed bool
	last   int
	jobs   []*job // by start
	wg     sync.WaitGroup
}

type job struct {
	Job
	cancel    context.CancelFunc
	cancelled bool
}

// New returns a runner without jobs.
func New() *Runner { return &Runner{prefix: rand.Text()[:4]} }

// Start begins a job and returns at once. It fails with ErrRunning if one of that kind is under way for the
// subject; the job is that one then.
func (r *Runner) Start(kind, subject string, work Work) (Job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return Job{}, ErrClosed
	}
	for _, j := range r.jobs {
		if j.Kind == kind && j.Subject == subject && j.State == Running {
			return j.Job, fmt.Errorf("%s of %s %w: job %s", kind, subject, ErrRunning, j.ID)
		}
	}
	r.last++
	ctx, cancel := context.WithCancel(context.Background())
	j := &job{cancel: cancel, Job: Job{
		ID: fmt.Sprintf("%s-%s-%d", kind, r.prefix, r.last), Kind: kind, Subject: subject, State: Running, Started: time.Now().UTC(),
	}}
	r.jobs = append(r.jobs, j)
	r.forgetLocked()
	r.wg.Go(func() {
		defer cancel()
		report, err := run(ctx, work, func(p Progress) {
			r.mu.Lock()
			defer r.mu.Unlock()
			j.Progress = p
		})
		r.end(j, report, err)
	})
	return j.Job, nil
}

// run is work that fails where it panics: the gateway goes on.
func run(ctx context.Context, work Work, tell func(Progress)) (report any, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return work(ctx, tell)
}

func (r *Runner) end(j *job, report any, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now().UTC()
	j.Ended, j.Report, j.State = &now, report, Done
	switch {
	case err != nil && j.cancelled && errors.Is(err, context.Canceled):
		j.State = Cancelled
	case err != nil:
		j.State, j.Error = Failed, err.Error()
	}
}

// forgetLocked drops the oldest jobs that have ended.
func (r *Runner) forgetLocked() {
	for n := len(r.jobs) - kept; n > 0; n-- {
		i := slices.IndexFunc(r.jobs, func(j *job) bool { return j.State != Running })
		if i < 0 {
			return
		}
		r.jobs = slices.Delete(r.jobs, i, i+1)
	}
}

// List describes all jobs that are remembered, the newest last.
func (r *Runner) List() []Job {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Job, len(r.jobs))
	for i, j := range r.jobs {
		list[i] = j.Job
	}
	return list
}

// Get describes one job, or fails with ErrNoJob.
func (r *Runner) Get(id string) (Job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	j, err := r.findLocked(id)
	if err != nil {
		return Job{}, err
	}
	return j.Job, nil
}

func (r *Runner) findLocked(id string) (*job, error) {
	for _, j := range r.jobs {
		if j.ID == id {
			return j, nil
		}
	}
	return nil, fmt.Errorf("job %s: %w", id, ErrNoJob)
}

// Cancel asks a job to end; one that has ended stays as it is. It does not wait.
func (r *Runner) Cancel(id string) (Job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	j, err := r.findLocked(id)
	if err != nil {
		return Job{}, err
	}
	j.cancelled = true
	j.cancel()
	return j.Job, nil
}

// Close ends all jobs, waits for them, and refuses new ones.
func (r *Runner) Close() {
	r.mu.Lock()
	r.closed = true
	for _, j := range r.jobs {
		if j.State == Running {
			j.cancelled = true
			j.cancel()
		}
	}
	r.mu.Unlock()
	r.wg.Wait()
}
