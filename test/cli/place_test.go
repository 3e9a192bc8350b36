package cli

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"

	"graindisk/backend/backendtest/miniotest"
	"graindisk/test/harness"
)

// place is a directory with everything of one case: a configuration, a data directory, a tier and targets.
type place struct {
	t       *testing.T
	dir     string
	config  string
	targets []string // lines of the configuration
}

// newPlace has three empty directories t0, t1 and t2 as targets, and a configuration for them.
func newPlace(t *testing.T) *place {
	p := &place{t: t, dir: t.TempDir()}
	for i := range 3 {
		dir := p.path(fmt.Sprintf("t%d", i))
		p.must(os.Mkdir(dir, 0o700))
		p.targets = append(p.targets, fmt.Sprintf("{name: t%d, local: {dir: %q}}", i, dir))
	}
	p.configure("")
	return p
}

func (p *place) path(name string) string { return filepath.Join(p.dir, name) }

func (p *place) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// configure writes gateway.yaml; more is added to it, as a line.
func (p *place) configure(more string) {
	p.t.Helper()
	p.config = p.path("gateway.yaml")
	p.write("gateway.yaml", fmt.Sprintf("data: %q\ntier: {dir: %q, size: 512MiB, ram: 16MiB}\nshutdown_timeout: 5s\n%s\npools:\n  main:\n    beat: 500ms\n    watch: 3s\n    targets:\n      - %s\n",
		p.path("data"), p.path("tier"), more, strings.Join(p.targets, "\n      - ")))
}

func (p *place) write(name, text string) {
	p.t.Helper()
	p.must(os.WriteFile(p.path(name), []byte(text), 0o600))
}

// create creates the configured pool.
func (p *place) create() *place {
	p.t.Helper()
	harness.Must(p.t, harness.Binary(p.t), "pool", "create", "main", "--config", p.config)
	return p
}

// served lets a gateway serve the configured pool with a disk in it, and end as how says.
func (p *place) served(end func(*harness.Gateway)) *place {
	p.t.Helper()
	g := harness.Serve(p.t, "--config", p.config)
	harness.Must(p.t, harness.Binary(p.t), "disk", "create", "vm", "1MiB", "--config", p.config)
	end(g)
	return p
}

func (p *place) killed() *place { return p.served((*harness.Gateway).Kill) }

// empty removes all that a target holds.
func (p *place) empty(names ...string) *place {
	p.t.Helper()
	for _, name := range names {
		p.must(os.RemoveAll(p.path(name)))
		p.must(os.Mkdir(p.path(name), 0o700))
	}
	return p
}

// files are what the targets and the tier must keep: every object, and the identity of the log. What else
// the tier holds may be a running gateway's work.
func (p *place) files() map[string]string {
	p.t.Helper()
	all := map[string]string{}
	p.must(filepath.WalkDir(p.dir, func(path string, e fs.DirEntry, err error) error {
		name := strings.TrimPrefix(path, p.dir+"/")
		switch {
		case err != nil:
			return err
		case e.Name() == ".tmp":
			return fs.SkipDir // every opening of a directory makes it
		case e.Name() == "beat": // a running gateway may write it
		case e.Type().IsRegular() && (e.Name() == "identity" || strings.HasPrefix(name, "t0/") || strings.HasPrefix(name, "t1/") || strings.HasPrefix(name, "t2/")):
			body, err := os.ReadFile(path)
			all[name] = string(body)
			return err
		}
		return nil
	}))
	return all
}

// bucketTarget is the line of a target in a bucket.
func bucketTarget(endpoint, bucket, secret string) string {
	return fmt.Sprintf("{name: cloud, s3: {endpoint: %q, bucket: %s, path_style: true, access_key_id: %s, secret_access_key: %s}}",
		endpoint, bucket, miniotest.AccessKey, secret)
}

// holds are the objects of a bucket; of one that does not exist, none.
func holds(t *testing.T, s *miniotest.Server, bucket string) (keys []string) {
	t.Helper()
	if ok, err := s.Client().BucketExists(t.Context(), bucket); err != nil || !ok {
		return nil
	}
	for o := range s.Client().ListObjects(t.Context(), bucket, minio.ListObjectsOptions{Recursive: true}) {
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		keys = append(keys, o.Key)
	}
	return keys
}
