// Says what is on images, by transformers.js.
//
//     npm install @huggingface/transformers@4.3.2
//     node classify.mjs flowers_js/ photo.jpg another.png
import { env, pipeline } from '@huggingface/transformers';

const [folder, ...photos] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = './';
const classify = await pipeline('image-classification', folder, { dtype: 'fp32' });
for (const photo of photos) {
  console.log(photo);
  for (const { label, score } of await classify(photo, { top_k: 5 })) {
    console.log(`  ${label}  ${score.toFixed(4)}`);
  }
}
